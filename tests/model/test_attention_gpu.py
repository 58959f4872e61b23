"""The varlen kernel in 16 bits gives the results and gradients that dense groups give in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from infoxlm_ds.data.flat_batch import make_layout
from infoxlm_ds.data.upload import to_device
from infoxlm_ds.model.attention import flat_attention, why_not_varlen
from infoxlm_ds.model.families import FAMILIES

pytestmark = pytest.mark.gpu

LENGTHS = np.array([5, 64, 17, 17, 130, 1, 512])
# Largest distance to fp32, as a share of the norm: some units in the last place.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _head_width(family: str) -> int:
    """Of the family's published models."""
    config = AutoConfig.for_model(family)
    return int(config.hidden_size // config.num_attention_heads)


def _attend(tensors: list[Tensor], varlen: bool, window: int | None) -> list[Tensor]:
    """The result, and the gradients of query, key and value of a sum with fixed weights."""
    device, inputs = tensors[0].device, [x.detach().requires_grad_() for x in tensors]
    layout = to_device(make_layout(LENGTHS, dense=not varlen), device)
    q, k, v = inputs
    out, _ = flat_attention(torch.nn.Module(), q, k, v, None, layout=layout, sliding_window=window)
    weights = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), inputs)]


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("width", sorted({_head_width(family) for family in FAMILIES} | {16, 128}))
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_varlen_equals_groups_in_fp32(device: torch.device, dtype: torch.dtype, width: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, int(LENGTHS.sum()), width)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    expected = _attend([x.float() for x in tensors], varlen=False, window=window)
    reason = why_not_varlen(device, dtype, width)
    assert reason is None or device.type == "cpu", reason
    found = _attend([x.to(device) for x in tensors], varlen=reason is None, window=window)
    for ours, exact in zip(found, expected, strict=True):
        assert float((ours.float().cpu() - exact).norm() / exact.norm()) < BOUNDS[dtype]
