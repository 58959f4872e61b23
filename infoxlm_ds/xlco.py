"""Three ways through cross-lingual contrast (XlCo; InfoXLM, sections 3.2 and 3.3), of which a run has one.

- `AgainstMomentumKeys`: queries against keys of the momentum encoder (InfoXLM; MoCo).
- `TrainedKeys`: both sides have a gradient; each rank has one lane, and the contrast runs inside its pass.
- `CachedTrainedKeys`: the same with several lanes a rank. All lanes are encoded without a graph, the contrast is taken
  once for the whole step, and each lane's pass carries its part of the gradient back (Gao et al., 2021). So the
  contrast is as large as the step, however few pairs fit into memory.

Legend: b pairs of a lane, N pairs of the step, D width, R rows of a report.

A lane's `share` is its part of the step's loss: shares and their gradients add up over lanes and ranks.
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
from infoxlm_ds.losses.contrast import Form, Keys, Report, Temperature, contrast, contrast_with_keys, finished
from infoxlm_ds.model.encoder import SentenceEncoder
from infoxlm_ds.model.momentum import MomentumEncoder

Representations = Sides[Tensor]  # [b, D] each; [0, D] of a side that takes no part


class Rows(NamedTuple):
    """What the contrast reports, and the language pairs of the items its rows are of, [b, 1 or 2]."""

    report: Report
    names: np.ndarray


class XlCo(ABC):
    """One way through the contrast: `prepare` once a step, `share` for each of its lanes."""

    def __init__(self, contrast: Contrast, temperature: Temperature | None) -> None:
        """`temperature`: a learned one, in place of the recipe's number."""
        self._symmetric, self._number, self._learned = contrast.symmetric, contrast.temperature, temperature
        # Vectors come normalised from the sentence head where the recipe wants it.
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
        """What this rank's lanes (lowest first) need of the whole step of N `pairs`. Collective."""

    @abstractmethod
    def share(self, own: Representations, lane: JointBatch, step: Any, slot: int) -> tuple[Tensor, Rows | None]:
        """The share of the rank's lane number `slot`, whose representations have a graph, and its rows, if it has."""

    def second_sides(self, step: Any, lanes: Sequence[JointBatch], own: Sequence[Representations]) -> Keys:
        """Second sides of all lanes of the step, in lane order. Collective. `own`: this rank's representations."""
        ids = dist.gather_lanes([lane.text_ids for lane in lanes])
        return Keys(dist.gather_lanes([sides.second for sides in own]), ids)

    @property
    def temperature(self) -> float | Tensor:
        return self._number if self._learned is None else self._learned()

    def _learned_values(self) -> list[Tensor]:
        return [] if self._learned is None else [self._learned()]

    def _between(
        self, sides: Representations, temperature: float | Tensor, ids: Tensor, queue: Keys | None
    ) -> tuple[Tensor, Report]:
        """This rank's share of the contrast between trained sides."""
        loss, report = contrast(*sides, temperature, self._form, ids=ids, queue=queue, symmetric=self._symmetric)
        return loss / dist.world_size(), report  # every rank has the whole loss, and gradients times their number


@dataclass(frozen=True)
class KeysOfStep:
    """Momentum keys of all lanes and ranks in lane order, [N, D] each; first sides only where the contrast is
    symmetric."""

    keys: Sides[Keys]
    queue: Keys | None
    pairs: int


class AgainstMomentumKeys(XlCo):
    """First sides against second sides' keys, and the other way round where it is symmetric."""

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
        return KeysOfStep(Sides(first, second), queue, pairs)

    def share(self, own: Representations, lane: JointBatch, step: KeysOfStep, slot: int) -> tuple[Tensor, Rows | None]:
        if step.queue is None and not self._form.in_batch:  # the queue still fills
            nothing = [(x, torch.zeros_like(x)) for x in (*own, *self._learned_values())]
            return finished(own.first.new_zeros(()), nothing), None
        place = len(lane.text_ids) * (slot * dist.world_size() + dist.rank())
        positives = torch.arange(len(lane.text_ids), device=own.first.device) + place
        directions = [(own.first, step.keys.second)]
        directions += [(own.second, step.keys.first)] if self._symmetric else []
        shares, reports = [], []
        for queries, keys in directions:
            share, report = contrast_with_keys(
                queries,
                keys,
                positives,
                self.temperature,
                self._form,
                ids=lane.text_ids,
                queue=step.queue,
                total=step.pairs * len(directions),
            )
            shares.append(share)
            reports.append(report)
        return torch.stack(shares).sum(), Rows(Report.concatenate(reports), lane.names["xlco"])

    def second_sides(self, step: KeysOfStep, lanes: Sequence[JointBatch], own: Sequence[Representations]) -> Keys:
        return step.keys.second


class TrainedKeys(XlCo):
    """Both sides trained, within a lane's pass: each rank has one lane."""

    def prepare(
        self, lanes: Sequence[JointBatch], pairs: int, momentum: MomentumEncoder | None, queue: Keys | None
    ) -> Keys | None:
        assert len(lanes) == 1
        return queue

    def share(self, own: Representations, lane: JointBatch, step: Keys | None, slot: int) -> tuple[Tensor, Rows | None]:
        share, report = self._between(own, self.temperature, lane.text_ids, step)
        return share, Rows(report, lane.names["xlco"])


@dataclass(frozen=True)
class CachedStep:
    """The contrast of the whole step: this rank's share and rows, each lane's d share / d representations, and d share
    / d temperature."""

    share: Tensor
    rows: Rows
    gradients: tuple[Representations, ...]
    d_temperature: Tensor | None


class CachedTrainedKeys(XlCo):
    """Both sides trained, with several lanes a rank."""

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
        # fp32 from here on: a loss scale comes on the gradients later.
        wide = torch.promote_types(encoded[0].first.dtype, torch.float32)
        sides = Sides(*(torch.cat(side).to(wide) for side in zip(*encoded, strict=True)))
        learned = [x.detach() for x in self._learned_values()]
        inputs = [x.requires_grad_() for x in (*sides, *learned)]
        ids = torch.cat([lane.text_ids for lane in lanes])
        with torch.enable_grad():
            share, report = self._between(sides, learned[0] if learned else self._number, ids, queue)
            d_first, d_second, *d_temperature = torch.autograd.grad(share, inputs)
        sizes = [len(lane.text_ids) for lane in lanes]
        gradients = tuple(Sides(*both) for both in zip(d_first.split(sizes), d_second.split(sizes), strict=True))
        rows = Rows(report, np.concatenate([lane.names["xlco"] for lane in lanes]))
        return CachedStep(share.detach(), rows, gradients, d_temperature[0] if learned else None)

    def share(self, own: Representations, lane: JointBatch, step: CachedStep, slot: int) -> tuple[Tensor, Rows | None]:
        """Share, rows and the temperature's gradient are the whole rank's: the first lane has them."""
        first = slot == 0
        inputs = list(zip(own, step.gradients[slot], strict=True))
        if step.d_temperature is not None:
            inputs += [(x, step.d_temperature * first) for x in self._learned_values()]
        return finished(step.share * first, inputs), step.rows if first else None


def choose_xlco(
    contrast: Contrast, lanes_a_rank: int, temperature: Temperature | None, encoder: Callable[[], SentenceEncoder]
) -> XlCo:
    """The way of a recipe. `encoder` gives the trained sentence encoder."""
    if contrast.keys == "momentum":
        return AgainstMomentumKeys(contrast, temperature)
    if lanes_a_rank == 1:
        return TrainedKeys(contrast, temperature)
    return CachedTrainedKeys(contrast, temperature, encoder)
