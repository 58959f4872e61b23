"""The key encoder: an exponential average of the query encoder's fp32 master weights, held in fp32 (InfoXLM, section
3.2; MoCo).

Held in 16 bits the average stands still: with m = 0.9999 a move of one step is below half a unit in the last place. So
each rank averages, in fp32, the fragment of the masters that the optimizer gave it, and hands the result to the weights
to compute with: by one sum over ranks, or into its own shard of them where they are sharded alike.
"""

from __future__ import annotations

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
Write = Callable[[Sequence[nn.Parameter], Sequence[Fragment]], None]


class MomentumEncoder:
    """Embeddings, first K layers and projection, as a copy that follows `source`. It is no part of the engine's
    module."""

    def __init__(
        self, source: SentenceEncoder, encoder: SentenceEncoder, masters: Masters, write: Write, momentum: float
    ) -> None:
        """`encoder` is a copy of `source`. `masters` gives this rank's fragments of the fp32 masters of parameters,
        `write` sets parameters from the fragments of all ranks."""
        self._source = list(source.parameters())
        self._masters, self._write, self.momentum = masters, write, momentum
        self.encoder = encoder
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
        self._write(list(self.encoder.parameters()), self.shadow)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's fragments, named `parameter:start`."""
        return {f"{f.parameter}:{f.start}": f.values for f in self.shadow}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for f in self.shadow:
            f.values.copy_(state[f"{f.parameter}:{f.start}"])
        self._write(list(self.encoder.parameters()), self.shadow)


@torch.no_grad()
def write_whole(parameters: Sequence[nn.Parameter], fragments: Sequence[Fragment], sharded: bool) -> None:
    """Set parameters, which every rank holds whole, from fragments: this rank's, or where `sharded` those of all, by
    one collective."""
    sizes = [p.numel() for p in parameters]
    buffer = torch.zeros(sum(sizes), device=parameters[0].device)
    flat = buffer.split(sizes)
    for f in fragments:
        flat[f.parameter][f.start : f.start + len(f.values)] = f.values
    if sharded:
        dist.sum_over_ranks(buffer)
    for parameter, values in zip(parameters, flat, strict=True):
        parameter.copy_(values.view_as(parameter))
