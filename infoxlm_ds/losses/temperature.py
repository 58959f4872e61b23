"""A learned temperature of the contrast."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """A learned temperature with bounds. Its value is clamped. Its gradient is zero only if a step would lead further
    out of the bounds, so the parameter can always come back.

    The parameter is the logarithm of temperature / start, so it begins at 0, where bf16 is finest. An engine that casts
    it to bf16 gives steps of 0.4 % to a temperature that has doubled, and smaller ones before. The logarithm of the
    temperature itself, -2.7 at 0.07, would make steps of 1.6 % from the beginning. Everything else is in fp32.
    """

    def __init__(self, start: float, lowest: float, highest: float) -> None:
        super().__init__()
        if not 0 < lowest <= start <= highest:
            raise ValueError(f"a temperature needs 0 < lowest <= start <= highest, not {lowest}, {start}, {highest}")
        self.log_ratio = nn.Parameter(torch.zeros(1))
        self._start, self._bounds = start, (log(lowest / start), log(highest / start))

    def forward(self) -> Tensor:
        """The temperature, [], in fp32 or wider."""
        wide = self.log_ratio.to(torch.promote_types(self.log_ratio.dtype, torch.float32))
        ratio: Tensor = _Bounded.apply(wide, *self._bounds)  # type: ignore[no-untyped-call]
        return self._start * ratio.exp().squeeze(0)


class _Bounded(torch.autograd.Function):
    """Clamp to [lowest, highest]. The gradient passes unless a step along it leads further out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: float, highest: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (lowest, highest)
        return x.clamp(lowest, highest)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        (x,), (lowest, highest) = ctx.saved_tensors, ctx.bounds
        outwards = ((x <= lowest) & (d_out > 0)) | ((x >= highest) & (d_out < 0))
        return d_out.masked_fill(outwards, 0.0), None, None
