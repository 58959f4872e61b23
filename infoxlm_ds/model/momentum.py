"""The key encoder: an exponential average of the query encoder's fp32 master weights, held in fp32
(InfoXLM, section 3.2; MoCo).

In 16 bits the average would stand still: with m = 0.9999, the move of one step is below half a unit in the last place.
So each rank averages, in fp32, the fragment of the masters that the optimizer gave to it. Then the result goes to the
weights that compute the keys: by one gather over ranks or, if they are sharded in the same way, into the rank's own
shard. Where those weights are fp32 and this rank averages them whole, they are the average itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.config import Constant, ConstantWithRefresh, Exponential, Linear
from infoxlm_ds.data.flat_batch import FlatBatch
from infoxlm_ds.model.encoder import SentenceEncoder


@dataclass(frozen=True)
class Fragment:
    """A rank's part of the fp32 master of a parameter: `values` [n] begin at `start` of the
    flattened parameter number `parameter`."""

    parameter: int
    start: int
    values: Tensor


Schedule = Constant | ConstantWithRefresh | Linear | Exponential
Masters = Callable[[Sequence[nn.Parameter]], list[Fragment]]
# From parameters and this rank's fragments: a function that sets the parameters from the fragments of all ranks.
Writer = Callable[[Sequence[nn.Parameter], Sequence[Fragment]], Callable[[], None]]


class MomentumEncoder:
    """A copy of the embeddings, the first K layers and the projection. It follows `source`, and it is not part
    of the engine's module.

    `source`: the parameters that it follows. `shadow`: this rank's fragments of their averages. After a change of these
    from outside, call `write`, which is collective: it sets the weights that compute the keys.
    """

    def __init__(
        self, source: SentenceEncoder, encoder: SentenceEncoder, masters: Masters, writer: Writer, schedule: Schedule
    ) -> None:
        """`encoder`: a copy of `source`. `masters`: gives this rank's fragments of the fp32 masters of parameters.
        Collective."""
        self.source = list(source.parameters())
        self._masters, self._schedule = masters, schedule
        self.encoder = encoder
        self.shadow = [Fragment(f.parameter, f.start, f.values.detach().clone()) for f in masters(self.source)]
        self.write = writer(list(encoder.parameters()), self.shadow)

    @torch.no_grad()
    def encode(self, batch: FlatBatch) -> Tensor:
        """Keys [S, D] of the batch's sequences."""
        out: Tensor = self.encoder(batch)
        return out

    @torch.no_grad()
    def update(self, number: int) -> None:
        """key = m key + (1 - m) query, after applied optimizer step `number` (1 is the first)."""
        masters = self._masters(self.source)
        assert [(f.parameter, f.start) for f in masters] == [(f.parameter, f.start) for f in self.shadow]
        if masters:
            weight = 1 - momentum_at(self._schedule, number)
            torch._foreach_lerp_([f.values for f in self.shadow], [f.values for f in masters], weight)
        self.write()

    @torch.no_grad()
    def follow(self, number: int) -> dict[str, float]:
        """`update`, and a report of its effect: the share of weights that changed in the encoder's own precision, and
        the distance to the query encoder's weights, relative to their norm. Collective."""
        dtype = next(self.encoder.parameters()).dtype
        before = [f.values.to(dtype, copy=True) for f in self.shadow]
        self.update(number)
        weights = float(sum(old.numel() for old in before))
        sums = torch.tensor([0.0, weights, 0.0, 0.0], dtype=torch.float64).to(dist.device())
        for old, new, query in zip(before, self.shadow, self._masters(self.source), strict=True):
            changed, apart = (old != new.values.to(dtype)).sum(), (new.values - query.values).square().sum()
            sums += torch.stack([changed, torch.zeros_like(changed), apart, query.values.square().sum()]).to(sums)
        changed, weights, apart, length = dist.sum_over_ranks(sums).tolist()
        return {"momentum/changed_share": changed / weights, "momentum/distance": (apart / length) ** 0.5}


def momentum_at(schedule: Schedule, number: int) -> float:
    """The momentum of update `number`; the first is 1 (`get_xlco_momentum` of the reference)."""
    match schedule:
        case Constant(value=value):
            return value
        case ConstantWithRefresh(value=value, every=every):
            return 0.0 if number % every == 0 else value
        case Linear(updates=(first, last), values=(start, end)):
            return start + (end - start) * min(max((number - first) / (last - first), 0), 1)
        case Exponential(power=power, within=(lowest, highest)):
            return min(max(1 - max(number, 1) ** -power, lowest), highest)


class WriteWhole:
    """Sets parameters that every rank holds whole from this rank's fragments and, if they are `sharded`, from those of
    the other ranks. Otherwise, a parameter of which a fragment is the whole, in the same type and place, uses the
    fragment's memory from now on, and there is nothing to write."""

    def __init__(self, parameters: Sequence[nn.Parameter], fragments: Sequence[Fragment], sharded: bool) -> None:
        """The fragments must stay where they are. Parameters may get other memory. Collective if `sharded`."""
        self._sharded, self._nothing = sharded, parameters[0].detach().new_zeros(0)
        if not sharded:
            fragments = [f for f in fragments if not _share(parameters[f.parameter], f.values)]
        self._values = [f.values for f in fragments]
        own = [(f.parameter, f.start, len(f.values)) for f in fragments]
        places = dist.gather_objects(own) if sharded else [own]
        self._sizes = [[size for _, _, size in of_a_rank] for of_a_rank in places]
        flat = [p.detach().view(-1) for p in parameters]
        self._targets = [
            flat[number][start : start + size] for of_a_rank in places for number, start, size in of_a_rank
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Collective if sharded: one gather, in the parameters' own type."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._gathered() if self._sharded else self._values)

    def _gathered(self) -> list[Tensor]:
        own = torch.cat([self._nothing, *(x.to(self._nothing) for x in self._values)])
        parts = dist.gather_parts(own, [sum(sizes) for sizes in self._sizes])
        return [x for part, sizes in zip(parts, self._sizes, strict=True) for x in part.split(sizes)]


def _share(parameter: nn.Parameter, values: Tensor) -> bool:
    """Let a parameter use this memory if it fits. Returns whether it does."""
    if (len(values), values.dtype, values.device) != (parameter.numel(), parameter.dtype, parameter.device):
        return False
    parameter.data = values.view_as(parameter)
    return True
