"""JointBatch to loss: MMLM, TLM and XlCo of one lane in one pass (InfoXLM, sections 3.1 to 3.3).

Legend: b pairs of this lane, N pairs of the step, D width.

Each lane's loss is its *share* of the step's: sums over its own rows divided by the step's counts, so that shares and
gradients add up over lanes and ranks to the per-task means. `StepContext` is what a lane must know of the others, made
once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.config import Recipe
from infoxlm_ds.data.batch import JointBatch, Sequences
from infoxlm_ds.losses.contrast import ContrastReport, Keys, contrast, contrast_gradients, with_gradients
from infoxlm_ds.model.attention import pack
from infoxlm_ds.model.encoder import InfoXLM, Packed, packed
from infoxlm_ds.model.heads import masked_lm_loss
from infoxlm_ds.model.momentum import MomentumEncoder

TASKS = ("mmlm", "tlm", "xlco")


@dataclass(frozen=True)
class Cached:
    """Contrast of the whole step, finished ahead of the lanes' passes: this rank's share and each lane's d share / d
    reps."""

    share: Tensor
    gradients: tuple[Tensor, ...]
    reports: tuple[ContrastReport, ...]


@dataclass(frozen=True)
class StepContext:
    """`denominators`: what each task's sum is divided by, over all lanes and ranks. `sides`: keys of the whole step in
    lane order, [N, D] each, without gradient: second sides, and first sides where symmetric. `ids` [N, I]."""

    denominators: dict[str, int]
    pairs: int
    queue: Keys | None = None
    sides: tuple[Tensor, ...] = ()
    ids: Tensor | None = None
    cached: Cached | None = None


# Sums over masked rows and pairs by `task/name`, left on the device for the log to add up.
Report = dict[str, Tensor | int]


class Objective(nn.Module):
    """What the engine trains: the model and its three losses."""

    def __init__(self, recipe: Recipe, model: InfoXLM) -> None:
        super().__init__()
        self.model = model
        self._contrast, self._weights, self._reduction = recipe.contrast, recipe.weights, recipe.reduction
        self._tasks = recipe.tasks

    def prepare(
        self, micros: Sequence[JointBatch], momentum: MomentumEncoder | None, queue: Keys | None
    ) -> StepContext:
        """What this rank's lanes (lowest first) need of the others. Collective: every rank calls it at every step."""
        counts = torch.tensor([sum(m.counts[task] for m in micros) for task in TASKS], device=self._device)
        totals = dict(zip(TASKS, dist.sum_over_ranks(counts).tolist(), strict=True))
        whole = sum(totals.values())
        denominators = {task: max(1, whole if self._reduction == "reference" else n) for task, n in totals.items()}
        pairs = totals["xlco"]
        if not self._tasks["xlco"]:
            return StepContext(denominators, pairs)
        ids = [self._ids(m) for m in micros]
        if queue is not None:
            queue = Keys(queue.vectors, queue.ids[:, : ids[0].shape[1]])
        if momentum is None:
            cached = self._ahead(micros, torch.cat(ids), queue) if len(micros) > 1 else None
            return StepContext(denominators, pairs, queue, cached=cached)
        per_lane = [momentum.encode(self._to_device(m.keys)) for m in micros if m.keys is not None]
        sides = zip(*(reps.split(len(m.text_ids)) for reps, m in zip(per_lane, micros, strict=True)), strict=True)
        gathered = tuple(dist.gather_lanes(side) for side in sides)[::-1]  # second sides first
        return StepContext(denominators, pairs, queue, gathered, dist.gather_lanes(ids))

    def forward(self, batch: JointBatch, context: StepContext, slot: int) -> tuple[Tensor, Report, Tensor]:
        """The loss share of this rank's lane number `slot`, a report, and the lane's representations without
        gradient."""
        tokens, trunk = self._to_device(batch.tokens), pack(batch.tokens.lengths[: batch.trunk]).to(self._device)
        hidden, reps = self.model(tokens, trunk, batch.trunk)
        report: Report = {}
        loss = self._masked_lm(hidden, batch, context, report)
        if self._tasks["xlco"]:
            share, reports = self._xlco(reps, batch, context, slot)
            weight = self._weights.xlco * context.pairs / context.denominators["xlco"]
            loss = loss + weight * share
            report |= _contrast_report(reports)
        return loss, report, reps.detach()

    def _masked_lm(self, hidden: Tensor, batch: JointBatch, context: StepContext, report: Report) -> Tensor:
        rows, labels = (torch.from_numpy(x).to(self._device) for x in (batch.rows, batch.labels))
        weights = torch.full((len(rows),), self._weights.tlm / context.denominators["tlm"], device=self._device)
        weights[: batch.mmlm] = self._weights.mmlm / context.denominators["mmlm"]
        loss, each = masked_lm_loss(self.model.lm, hidden[rows], labels, weights)
        for task, part in (("mmlm", each[: batch.mmlm]), ("tlm", each[batch.mmlm :])):
            if self._tasks[task]:
                report |= {f"{task}/loss": part.sum(), f"{task}/items": len(part)}
        return loss

    def _xlco(
        self, reps: Tensor, batch: JointBatch, context: StepContext, slot: int
    ) -> tuple[Tensor, Sequence[ContrastReport]]:
        how, ids = self._contrast, self._ids(batch)
        if context.cached is not None:
            cached = context.cached  # its share and reports are the whole rank's: they count once
            share = cached.share if slot == 0 else torch.zeros_like(cached.share)
            return with_gradients(share, (reps, cached.gradients[slot])), cached.reports if slot == 0 else ()
        if how.keys == "gradient":
            first, second = reps.chunk(2)
            share, d_first, d_second, reports = contrast_gradients(
                first, second, ids=ids, temperature=how.temperature, symmetric=how.symmetric, queue=context.queue
            )
            return with_gradients(share, (first, d_first), (second, d_second)), reports
        return self._against_momentum_keys(reps, ids, context, slot)

    def _against_momentum_keys(
        self, reps: Tensor, ids: Tensor, context: StepContext, slot: int
    ) -> tuple[Tensor, list[ContrastReport]]:
        how = self._contrast
        own = torch.arange(len(ids), device=reps.device) + len(ids) * (slot * dist.world_size() + dist.rank())
        share = reps.new_zeros((), dtype=torch.float32)
        reports: list[ContrastReport] = []
        if context.queue is None and not how.in_batch:
            return share + 0.0 * reps.sum(), reports  # the queue still fills
        assert context.ids is not None
        queries = reps.split(len(ids))
        for query, keys in zip(queries, context.sides, strict=True):
            one, report = contrast(
                query,
                Keys(keys, context.ids),
                own,
                ids=ids,
                temperature=how.temperature,
                total=context.pairs * len(queries),
                in_batch=how.in_batch,
                queue=context.queue,
            )
            share = share + one
            reports.append(report)
        return share, reports

    @torch.no_grad()
    def _ahead(self, micros: Sequence[JointBatch], ids: Tensor, queue: Keys | None) -> Cached:
        """Cached representations: encode all lanes without a graph, then one contrast over the whole step. The lanes'
        own passes then only carry the gradient back, so the contrast is as large as the step however few pairs fit into
        memory."""
        encoder, how = self.model.sentence_encoder(), self._contrast
        reps = [encoder(self._to_device(_queries(m))) for m in micros]
        first, second = (torch.cat(side) for side in zip(*(r.chunk(2) for r in reps), strict=True))
        share, d_first, d_second, reports = contrast_gradients(
            first, second, ids=ids, temperature=how.temperature, symmetric=how.symmetric, queue=queue
        )
        sizes = [len(m.text_ids) for m in micros]
        gradients = tuple(torch.cat(both) for both in zip(d_first.split(sizes), d_second.split(sizes), strict=True))
        return Cached(share, gradients, tuple(reports))

    def new_keys(self, context: StepContext, micros: Sequence[JointBatch], reps: Sequence[Tensor]) -> Keys:
        """What the queue gets of this step: the second sides of all lanes and their text ids, in lane order.
        Collective.

        `micros` and `reps`: this rank's lanes and what `forward` returned for them.
        """
        vectors = context.sides[0] if context.sides else dist.gather_lanes([r.chunk(2)[1] for r in reps])
        return Keys(vectors, dist.gather_lanes([torch.from_numpy(m.text_ids).to(self._device) for m in micros]))

    def _ids(self, batch: JointBatch) -> Tensor:
        ids = torch.from_numpy(batch.text_ids).to(self._device)
        return ids if self._contrast.mask_same_text else ids[:, :0]

    def _to_device(self, sequences: Sequences) -> Packed:
        return packed(sequences.ids, sequences.lengths).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _queries(batch: JointBatch) -> Sequences:
    tokens = batch.tokens
    return Sequences(tokens.ids[int(tokens.lengths[: batch.trunk].sum()) :], tokens.lengths[batch.trunk :])


def _contrast_report(reports: Sequence[ContrastReport]) -> Report:
    if not reports:
        return {}
    columns = {
        "loss": [one.loss for one in reports],
        "hits": [one.positive > one.hardest for one in reports],
        "positive": [one.positive for one in reports],
        "hardest": [one.hardest for one in reports],
        "negatives": [one.negatives for one in reports],
        "masked": [one.masked for one in reports],
    }
    sums: Report = {f"xlco/{name}": torch.cat(rows).sum() for name, rows in columns.items()}
    return sums | {"xlco/items": sum(len(one.loss) for one in reports)}
