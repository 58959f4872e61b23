"""The key encoder: an exponential average of the query encoder's fp32 master weights, held in fp32 (InfoXLM, section
3.2; MoCo).

Held in 16 bits the average stands still: with m = 0.9999 a move of one step is below half a unit in the last place. So
each rank averages, in fp32, the fragment of the masters that the optimizer gave it, and one sum over ranks rebuilds the
weights to compute with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.model.encoder import Packed, SentenceEncoder


@dataclass(frozen=True)
class Fragment:
    """A rank's part of a parameter's fp32 master: `values` [n] stand at `start` of the flattened parameter number
    `parameter`."""

    parameter: int
    start: int
    values: Tensor


Masters = Callable[[Sequence[nn.Parameter]], list[Fragment]]


class MomentumEncoder:
    """Embeddings, first K layers and projection, as a copy that follows `source`. It is no part of the engine's
    module."""

    def __init__(self, source: SentenceEncoder, masters: Masters, momentum: float, sharded: bool) -> None:
        """`masters` gives this rank's fragments of the fp32 masters of parameters; `sharded`: they differ between
        ranks."""
        self._source = list(source.parameters())
        self._masters, self.momentum, self._sharded = masters, momentum, sharded
        self.encoder = copy.deepcopy(source).eval().requires_grad_(False)
        self.shadow = [Fragment(f.parameter, f.start, f.values.detach().clone()) for f in masters(self._source)]

    @torch.no_grad()
    def encode(self, batch: Packed) -> Tensor:
        """Keys [S, D] of packed sequences."""
        out: Tensor = self.encoder(batch)
        return out

    @torch.no_grad()
    def update(self) -> None:
        """key = m key + (1 - m) query, after an optimizer step that was applied."""
        masters = self._masters(self._source)
        assert [(f.parameter, f.start) for f in masters] == [(f.parameter, f.start) for f in self.shadow]
        if masters:
            torch._foreach_lerp_([f.values for f in self.shadow], [f.values for f in masters], 1 - self.momentum)
        self.rebuild()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Write the average into the weights that `encode` computes with."""
        parameters = list(self.encoder.parameters())
        sizes = [p.numel() for p in parameters]
        buffer = torch.zeros(sum(sizes), device=parameters[0].device)
        flat = buffer.split(sizes)
        for f in self.shadow:
            flat[f.parameter][f.start : f.start + len(f.values)] = f.values
        if self._sharded:
            dist.sum_over_ranks(buffer)
        for parameter, values in zip(parameters, flat, strict=True):
            parameter.copy_(values.view_as(parameter))

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's fragments, named `parameter:start`."""
        return {f"{f.parameter}:{f.start}": f.values for f in self.shadow}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for f in self.shadow:
            f.values.copy_(state[f"{f.parameter}:{f.start}"])
        self.rebuild()
