"""On a GPU, the contrast in fp32 gives what it gives on a CPU in float64, also where the user allows TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from infoxlm_ds.losses.contrast import Form, Keys, contrast

pytestmark = pytest.mark.gpu

FORMS = {
    "inner products": Form(),
    "cosines with a margin": Form(cosine=True, margin=0.1),
    "further positives": Form(same_text="positive"),
    "cut": Form(drop_within=0.1),
}


@pytest.fixture(params=[False, True], ids=["fp32", "TF32 allowed"])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the user lets products of fp32 matrices run in TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, request.param
    yield request.param
    matmul.allow_tf32 = before


def _run(form: Form, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Loss, gradients of queries, keys and temperature, and counts, of 700 pairs and 9,000 queued keys."""
    generator, width = torch.Generator().manual_seed(0), 96
    # Multiples of 1/64 are exact in fp32, so that both precisions see the same vectors.
    rows = normalize(torch.randn(9_700, width, generator=generator), dim=1).mul(64).round().div(64).to(device, dtype)
    query = (rows[:700] + rows[:700].roll(1, 0) / 2).requires_grad_()
    key = rows[:700].clone().requires_grad_()
    ids = torch.randint(5_000, (9_700, 2), generator=generator)
    temperature = torch.tensor(0.07, device=device, dtype=dtype, requires_grad=True)
    queue = Keys(rows[700:], ids[700:])
    loss, report = contrast(query, key, temperature, form, ids=ids[:700], queue=queue, symmetric=True)
    gradients = torch.autograd.grad(loss, [query, key, temperature])
    counts = torch.stack([report.negatives, report.masked, report.positives, report.dropped]).sum(1)
    return [x.detach().cpu().double() for x in (loss, *gradients, counts)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_contrast_equals_float64_on_a_cpu(device: torch.device, tf32: bool, form: Form) -> None:
    expected = _run(form, torch.device("cpu"), torch.float64)
    found = _run(form, device, torch.float32)
    for ours, exact in zip(found[:-1], expected[:-1], strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 1e-4  # TF32 is ten times as far away
    assert torch.equal(found[-1], expected[-1])
    assert torch.backends.cuda.matmul.allow_tf32 == tf32  # as the user left it
