"""For known arrangements, diagnostics have the values that their papers give."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from infoxlm_ds.losses.diagnostics import alignment, effective_rank, uniformity


def test_alignment_is_0_for_equal_2_for_orthogonal_and_4_for_opposite_vectors() -> None:
    x = torch.eye(4)
    for other, expected in ((3 * x, 0.0), (x.roll(1, 0), 2.0), (-x, 4.0)):
        assert float(alignment(x, other)) == pytest.approx(expected, abs=1e-6)


def test_uniformity_is_that_of_all_pairs_and_0_after_a_collapse() -> None:
    x = normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    squared = 2 - 2 * (x @ x.t())
    pairs = squared[torch.triu_indices(50, 50, 1).unbind()]
    assert float(uniformity(7 * x)) == pytest.approx(float((-2 * pairs).exp().mean().log()), rel=1e-5)
    assert float(uniformity(x[:1].expand(50, 8))) == pytest.approx(0.0, abs=1e-4)


def test_effective_rank_counts_the_dimensions_in_use() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=g))[0]
    for used in (1, 5, 32):
        assert float(effective_rank(basis[:used].repeat(4, 1))) == pytest.approx(used, rel=1e-3)
