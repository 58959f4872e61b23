"""Losses whose gradients are computed in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradients(value: Tensor, inputs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A loss with the given value and known gradients. `inputs`: pairs (tensor, gradient); backward gives each tensor
    its gradient times the incoming one."""
    tensors, gradients = zip(*inputs, strict=True)
    result: Tensor = _WithGradients.apply(value, len(inputs), *tensors, *gradients)  # type: ignore[no-untyped-call]
    return result


class _WithGradients(torch.autograd.Function):
    """`apply(value, n, *tensors, *gradients)` with n tensors and n gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        ctx.dtypes = [t.dtype for t in tensors[:count]]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        # Cast after scaling: without the loss scale, a gradient may vanish in 16 bits.
        scaled = [(g * d_value).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, *scaled, *(None for _ in scaled)
