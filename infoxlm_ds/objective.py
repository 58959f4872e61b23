"""Computes the losses of one lane in one pass: MMLM, TLM and XlCo (InfoXLM, sections 3.1 to 3.3).

A lane is one micro-batch of a step. Each loss is the lane's *share* of the step's loss: a sum over the lane's own rows,
divided by the step's count and multiplied by the task's weight. So shares and gradients add up over lanes and ranks to
the weighted means of the tasks.

Legend: b pairs of this lane, M masked rows, D width, R rows of the contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.config import Recipe
from infoxlm_ds.data.batch import JointBatch, split_sides
from infoxlm_ds.losses.contrast import Report as ContrastReport
from infoxlm_ds.losses.diagnostics import describe_space
from infoxlm_ds.losses.keys import Keys
from infoxlm_ds.losses.temperature import Temperature
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.heads import masked_lm_losses
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.xlco import Representations, choose_xlco

TASKS = ("mmlm", "tlm", "xlco")


@dataclass(frozen=True)
class Step:
    """What a lane must know about the whole step.

    `denominators`: the divisor of each task's sum, over all lanes and ranks. `pairs`: the number of pairs. `xlco`:
    what the contrast prepared.
    """

    denominators: dict[str, int]
    pairs: int
    xlco: Any


@dataclass
class Report:
    """The figures of one lane. They stay on the device until the log adds them up.

    `sums`: sums over masked rows and over pairs, by `task/name`. `masked` [M]: the loss of each masked row. `contrast`
    [2, R]: loss and hit of each row of the contrast; rows of the second direction follow those of the first.
    `pair_names`: the language pairs of the items of these rows.
    """

    sums: dict[str, Tensor | int]
    masked: Tensor
    contrast: Tensor | None = None
    pair_names: np.ndarray | None = None


class Objective(nn.Module):
    """The module that the engine trains: the model, its three losses and, if it is learned, the temperature."""

    def __init__(self, recipe: Recipe, model: InfoXLM, lanes_a_rank: int = 1) -> None:
        super().__init__()
        self.model, contrast = model, recipe.contrast
        self._tasks, self._weights, self._reduction = recipe.tasks, recipe.weights, recipe.reduction
        self.temperature: Temperature | None = None
        if recipe.tasks["xlco"] and contrast.learn_temperature_within is not None:
            self.temperature = Temperature(contrast.temperature, *contrast.learn_temperature_within)
        self.xlco = choose_xlco(contrast, lanes_a_rank, self.temperature, model.sentence_encoder)

    def prepare(self, lanes: Sequence[JointBatch], momentum: MomentumEncoder | None, queue: Keys | None) -> Step:
        """What this rank's lanes (lowest first) need from the other ranks. Collective: every rank calls
        it at every step."""
        counts = torch.tensor([sum(lane.counts[task] for lane in lanes) for task in TASKS])
        totals = dict(zip(TASKS, dist.sum_over_ranks(counts).tolist(), strict=True))
        whole = sum(totals.values())
        denominators = {task: max(1, whole if self._reduction == "reference" else n) for task, n in totals.items()}
        pairs = totals["xlco"]
        prepared = self.xlco.prepare(lanes, pairs, momentum, queue) if self._tasks["xlco"] else None
        return Step(denominators, pairs, prepared)

    def forward(self, lane: JointBatch, step: Step, slot: int) -> tuple[dict[str, Tensor], Report, Representations]:
        """For this rank's lane number `slot`: its losses by task, to be added up; a report; and
        its representations without gradient."""
        states, vectors = self.model(lane.tokens, lane.trunk, lane.queries, lane.rows)
        own = split_sides(vectors, lane.sides)
        losses, report = self._masked_lm(states, lane, step)
        if self._tasks["xlco"]:
            share, rows = self.xlco.share(own, lane, step.xlco, slot)
            losses["xlco"] = self._weights.xlco * step.pairs / step.denominators["xlco"] * share
            if rows is not None:
                report.sums |= _contrast_sums(rows.report)
                hits = (rows.report.above == 0).to(rows.report.loss)
                report.contrast, report.pair_names = torch.stack([rows.report.loss, hits]), rows.names
        return losses, report, Representations(*(side.detach() for side in own))

    def _masked_lm(self, rows: Tensor, lane: JointBatch, step: Step) -> tuple[dict[str, Tensor], Report]:
        """MMLM and TLM share one pass of the head over the masked rows [M, D]."""
        weights = torch.full((len(rows),), self._weights.tlm / step.denominators["tlm"], device=rows.device)
        weights[: lane.mmlm] = self._weights.mmlm / step.denominators["mmlm"]
        weighted, each = masked_lm_losses(self.model.lm, rows, lane.labels, weights)
        losses, report = {}, Report({}, each)
        for task, part in lane.masked_parts.items():
            losses[task] = weighted[part].sum()
            if self._tasks[task]:
                report.sums |= {f"{task}/loss": each[part].sum(), f"{task}/items": len(each[part])}
        return losses, report

    def second_sides(self, step: Step, lanes: Sequence[JointBatch], own: Sequence[Representations]) -> Keys:
        """The second sides of all lanes of the step, in lane order, for the queue. Collective.

        `lanes` and `own`: this rank's lanes and what `forward` returned for them.
        """
        return self.xlco.second_sides(step.xlco, lanes, own)

    @torch.no_grad()
    def geometry(self, own: Sequence[Representations], second: Keys, queue: Keys | None) -> dict[str, float]:
        """Measure how the representations of the step and of the queue lie in their space. Collective.

        `own`: this rank's representations; `second`: what `second_sides` returned.
        """
        first = dist.gather_lanes([sides.first for sides in own])
        values = describe_space(first, second.vectors, None if queue is None else queue.vectors)
        if self.temperature is not None:
            values["temperature"] = self.temperature()
        numbers = torch.stack(list(values.values())).tolist()
        return {f"xlco/{name}": number for name, number in zip(values, numbers, strict=True)}


def _contrast_sums(rows: ContrastReport) -> dict[str, Tensor | int]:
    columns = rows._asdict() | {
        "hits": rows.above == 0,
        "hardest": rows.hardest.nan_to_num(neginf=0.0),  # -inf in rows without negatives
        "log_choices": (1 + rows.negatives).log(),
    }
    return {f"xlco/{name}": values.sum() for name, values in columns.items()} | {"xlco/items": len(rows.loss)}
