"""On a GPU, the chunked linear cross-entropy gives the gradients of full logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from infoxlm_ds.losses import masked_lm as module

pytestmark = pytest.mark.gpu

BOUNDS = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-4}  # as a share of the norm


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gradients_are_near_the_exact_ones(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, for words that are likely and unlikely, with padding of the vocabulary and a loss scale."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 128)
    generator, pieces, padded = torch.Generator().manual_seed(0), 5_000, 5_056
    shapes = {(300, 64): 1.0, (padded, 64): 0.3, (padded,): 0.3}
    tensors = [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape, scale in shapes.items()]
    labels, weights = torch.randint(pieces, (300,), generator=generator), torch.rand(300, generator=generator) / 300
    labels[:150] = (tensors[0].float() @ tensors[1].float().t())[:150, :pieces].argmax(1)
    exact = [x.double().requires_grad_() for x in tensors]
    hidden, weight, bias = exact
    rows = cross_entropy((hidden @ weight.t() + bias)[:, :pieces], labels, reduction="none")
    expected = torch.autograd.grad((rows * weights).sum(), exact)

    inputs = [x.to(device).requires_grad_() for x in tensors]
    hidden, weight, bias = inputs
    weighted, each = module.masked_lm(hidden, weight, bias, labels.to(device), weights.to(device), pieces)
    found = torch.autograd.grad(8 * weighted.sum(), inputs)
    assert float((each.double().cpu() - rows.detach()).norm() / rows.detach().norm()) < BOUNDS[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.double().cpu() / 8 - theirs).norm() / theirs.norm()) < BOUNDS[dtype]
    assert not found[1][pieces:].any() and not found[2][pieces:].any()
