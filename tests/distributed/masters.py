"""The fp32 master weights of an engine, put together from all ranks' fragments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.engine import Engine


def whole_masters(engine: Engine, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The masters of these parameters, in their shapes. Collective."""
    flat = [torch.zeros(p.numel()) for p in parameters]
    for fragment in engine.masters(parameters):
        flat[fragment.parameter][fragment.start : fragment.start + len(fragment.values)] = fragment.values
    whole = [dist.sum_over_ranks(values) if engine.sharded else values for values in flat]
    return [values.view_as(p) for values, p in zip(whole, parameters, strict=True)]
