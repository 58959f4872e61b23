"""The fp32 master weights of an engine, put together from all ranks' fragments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.engine import Engine
from infoxlm_ds.model.momentum import Fragment


def whole_masters(engine: Engine, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The masters of these parameters, in their shapes. Collective."""
    return whole(engine.masters(parameters), parameters, engine.sharded)


@torch.no_grad()
def whole(fragments: Sequence[Fragment], parameters: Sequence[nn.Parameter], sharded: bool) -> list[Tensor]:
    """These parameters from the fragments of all ranks. Collective."""
    shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]  # stage 3 keeps the shape beside an empty parameter
    buffer = torch.zeros(sum(shape.numel() for shape in shapes))
    flat = buffer.split([shape.numel() for shape in shapes])
    for fragment in fragments:
        flat[fragment.parameter][fragment.start : fragment.start + len(fragment.values)] = fragment.values
    if sharded:
        dist.sum_over_ranks(buffer)
    return [values.view(shape) for values, shape in zip(flat, shapes, strict=True)]
