"""Three ways to compute cross-lingual contrast (XlCo; InfoXLM, sections 3.2 and 3.3). A run uses one of them.

- `AgainstMomentumKeys`: queries against keys of the momentum encoder (InfoXLM; MoCo).
- `TrainedKeys`: both sides of a pair have a gradient. Each rank has one lane, and the contrast runs inside its pass.
- `CachedTrainedKeys`: trained keys with several lanes on a rank. First, all lanes are encoded without a graph. Then the
  contrast of the whole step is computed once. Last, each lane's pass carries its part of the gradient back (Gao et al.,
  2021). So the contrast is as large as the step, however few pairs fit into memory.

A lane is one micro-batch of a step. A lane's `share` is its part of the step's loss: shares and their gradients add up
over lanes and ranks.

Legend: b pairs of a lane, h hard negatives of a lane, N pairs of the step, D width, R rows of a report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.config import Contrast
from infoxlm_ds.data.batch import JointBatch, Sides, split_sides
from infoxlm_ds.losses.contrast import Form, Report, contrast, contrast_with_keys
from infoxlm_ds.losses.keys import Keys
from infoxlm_ds.losses.known_gradients import with_gradients
from infoxlm_ds.losses.temperature import Temperature
from infoxlm_ds.model.encoder import SentenceEncoder
from infoxlm_ds.model.momentum import MomentumEncoder

Representations = Sides[Tensor]  # [b, D], [b, D], [h, D]; a side that takes no part is [0, D]


class Rows(NamedTuple):
    """The report of the contrast, and the language pairs of the items of its rows, [b, 1 or 2]."""

    report: Report
    names: np.ndarray


class XlCo(ABC):
    """One way to compute the contrast: `prepare` once a step, then `share` for each of its lanes."""

    def __init__(self, contrast: Contrast, temperature: Temperature | None) -> None:
        """`temperature`: a learned temperature, which replaces the recipe's number."""
        self._symmetric, self._number, self._learned = contrast.symmetric, contrast.temperature, temperature
        self._hard = contrast.hard_negatives > 0
        # If the recipe asks for it, the sentence head has already normalised the vectors.
        self._form = Form(
            in_batch=contrast.in_batch,
            margin=contrast.margin,
            same_text=contrast.same_text,
            drop_within=contrast.drop_within,
        )

    @abstractmethod
    def prepare(
        self, lanes: Sequence[JointBatch], pairs: int, momentum: MomentumEncoder | None, queue: Keys | None
    ) -> Any:
        """What this rank's lanes (lowest first) need to know about the whole step of N `pairs`. Collective."""

    @abstractmethod
    def share(self, own: Representations, lane: JointBatch, step: Any, slot: int) -> tuple[Tensor, Rows | None]:
        """The share of this rank's lane number `slot`, and its rows if it has any. `own`: its
        representations, with a graph."""

    def second_sides(self, step: Any, lanes: Sequence[JointBatch], own: Sequence[Representations]) -> Keys:
        """The second sides of all lanes of the step, in lane order. Collective. `own`: this rank's representations."""
        ids = dist.gather_lanes([lane.text_ids for lane in lanes])
        return Keys(dist.gather_lanes([sides.second for sides in own]), ids)

    @property
    def temperature(self) -> float | Tensor:
        """What scores are divided by now: a number, or [] with a gradient."""
        return self._number if self._learned is None else self._learned()

    def _learned_values(self) -> list[Tensor]:
        return [] if self._learned is None else [self._learned()]

    def _between(
        self, sides: Representations, temperature: float | Tensor, ids: Tensor, hard_ids: Tensor, queue: Keys | None
    ) -> tuple[Tensor, Report]:
        """This rank's share of the contrast between trained sides."""
        loss, report = contrast(
            sides.first,
            sides.second,
            temperature,
            self._form,
            ids=ids,
            queue=queue,
            hard=Keys(sides.hard, hard_ids) if self._hard else None,
            symmetric=self._symmetric,
        )
        # Every rank computes the whole loss, and its gradients are too large by a factor of the world size.
        return loss / dist.world_size(), report


@dataclass(frozen=True)
class KeysOfStep:
    """Momentum keys of all lanes and ranks in lane order: `first`, `second` [N, D], and `hard`, if there may be some.
    Only a symmetric contrast has keys of first sides."""

    first: Keys
    second: Keys
    hard: Keys | None
    queue: Keys | None
    pairs: int


class AgainstMomentumKeys(XlCo):
    """Contrasts first sides with keys of second sides and, if it is symmetric, also second sides with
    keys of first sides."""

    def prepare(
        self, lanes: Sequence[JointBatch], pairs: int, momentum: MomentumEncoder | None, queue: Keys | None
    ) -> KeysOfStep:
        assert momentum is not None
        encoded = []
        for lane in lanes:
            assert lane.keys is not None
            encoded.append(split_sides(momentum.encode(lane.keys), lane.key_sides))
        second = Keys(
            dist.gather_lanes([keys.second for keys in encoded]), dist.gather_lanes([lane.text_ids for lane in lanes])
        )
        first = second
        if self._symmetric:
            first = Keys.indexed(dist.gather_lanes([keys.first for keys in encoded]), second.texts)
        hard = None
        if self._hard:
            ids = dist.gather_lanes([lane.hard_ids for lane in lanes], uneven=True)
            hard = Keys(dist.gather_lanes([keys.hard for keys in encoded], uneven=True), ids)
        return KeysOfStep(first, second, hard, queue, pairs)

    def share(self, own: Representations, lane: JointBatch, step: KeysOfStep, slot: int) -> tuple[Tensor, Rows | None]:
        if step.queue is None and not self._form.in_batch:  # the queue is not full yet
            nothing = [(x, torch.zeros_like(x)) for x in (*own, *self._learned_values())]
            return with_gradients(own.first.new_zeros(()), nothing), None
        place = len(lane.text_ids) * (slot * dist.world_size() + dist.rank())
        directions = [(own.first, step.second, step.hard)]
        directions += [(own.second, step.first, None)] if self._symmetric else []
        shares, reports = [], []
        for queries, keys, hard in directions:
            share, report = contrast_with_keys(
                queries,
                keys,
                place,
                self.temperature,
                self._form,
                ids=lane.text_ids,
                queue=step.queue,
                hard=hard,
                total=step.pairs * len(directions),
            )
            shares.append(share)
            reports.append(report)
        return torch.stack(shares).sum(), Rows(Report.concatenate(reports), lane.names["xlco"])

    def second_sides(self, step: KeysOfStep, lanes: Sequence[JointBatch], own: Sequence[Representations]) -> Keys:
        return step.second


class TrainedKeys(XlCo):
    """Both sides are trained, inside a lane's pass. Each rank has one lane."""

    def prepare(
        self, lanes: Sequence[JointBatch], pairs: int, momentum: MomentumEncoder | None, queue: Keys | None
    ) -> Keys | None:
        assert len(lanes) == 1
        return queue

    def share(self, own: Representations, lane: JointBatch, step: Keys | None, slot: int) -> tuple[Tensor, Rows | None]:
        share, report = self._between(own, self.temperature, lane.text_ids, lane.hard_ids, step)
        return share, Rows(report, lane.names["xlco"])


@dataclass(frozen=True)
class CachedStep:
    """The contrast of the whole step: this rank's share and rows, d share / d representations of each lane (of hard
    negatives only if there may be some), and d share / d temperature."""

    share: Tensor
    rows: Rows
    gradients: tuple[tuple[Tensor, ...], ...]
    d_temperature: Tensor | None


class CachedTrainedKeys(XlCo):
    """Both sides are trained, with several lanes on a rank."""

    def __init__(
        self, contrast: Contrast, temperature: Temperature | None, encoder: Callable[[], SentenceEncoder]
    ) -> None:
        super().__init__(contrast, temperature)
        self._encoder = encoder

    def prepare(
        self, lanes: Sequence[JointBatch], pairs: int, momentum: MomentumEncoder | None, queue: Keys | None
    ) -> CachedStep:
        encoder = self._encoder()
        with torch.no_grad():
            encoded = [split_sides(encoder(lane.queries_alone), lane.sides) for lane in lanes]
        # fp32 from here on: these gradients do not have the loss scale yet.
        wide = torch.promote_types(encoded[0].first.dtype, torch.float32)
        sides = Sides(*(torch.cat(side).to(wide) for side in zip(*encoded, strict=True)))
        learned = [x.detach() for x in self._learned_values()]
        trained = [*sides] if self._hard else [sides.first, sides.second]
        inputs = [x.requires_grad_() for x in (*trained, *learned)]
        ids, hard_ids = (
            torch.cat(ids) for ids in zip(*((lane.text_ids, lane.hard_ids) for lane in lanes), strict=True)
        )
        with torch.enable_grad():
            share, report = self._between(sides, learned[0] if learned else self._number, ids, hard_ids, queue)
            gradients = torch.autograd.grad(share, inputs)
        sizes = zip(*(lane.sides for lane in lanes), strict=True)
        of_lanes = zip(
            *(d.split(counts) for d, counts in zip(gradients[: len(trained)], sizes, strict=False)), strict=True
        )
        rows = Rows(report, np.concatenate([lane.names["xlco"] for lane in lanes]))
        return CachedStep(share.detach(), rows, tuple(of_lanes), gradients[-1] if learned else None)

    def share(self, own: Representations, lane: JointBatch, step: CachedStep, slot: int) -> tuple[Tensor, Rows | None]:
        """The first lane returns the share, the rows and the temperature's gradient of the whole rank."""
        first = slot == 0
        inputs = list(zip(own, step.gradients[slot], strict=False))
        if step.d_temperature is not None:
            inputs += [(x, step.d_temperature * first) for x in self._learned_values()]
        return with_gradients(step.share * first, inputs), step.rows if first else None


def choose_xlco(
    contrast: Contrast, lanes_a_rank: int, temperature: Temperature | None, encoder: Callable[[], SentenceEncoder]
) -> XlCo:
    """The way that the recipe asks for. `encoder` returns the trained sentence encoder."""
    if contrast.keys == "momentum":
        return AgainstMomentumKeys(contrast, temperature)
    if lanes_a_rank == 1:
        return TrainedKeys(contrast, temperature)
    return CachedTrainedKeys(contrast, temperature, encoder)
