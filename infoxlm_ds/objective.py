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
from infoxlm_ds.config import Contrast, Recipe
from infoxlm_ds.data.batch import JointBatch, Sequences
from infoxlm_ds.losses import diagnostics
from infoxlm_ds.losses.contrast import Form, Keys, Temperature, contrast, contrast_with_keys, finished
from infoxlm_ds.losses.contrast import Report as ContrastReport
from infoxlm_ds.model.attention import pack
from infoxlm_ds.model.encoder import InfoXLM, Packed, packed
from infoxlm_ds.model.heads import masked_lm_loss
from infoxlm_ds.model.momentum import MomentumEncoder

TASKS = ("mmlm", "tlm", "xlco")
SAMPLE = 2048  # vectors that the diagnostics read


@dataclass(frozen=True)
class Cached:
    """Contrast of the whole step, finished ahead of the lanes' passes: this rank's share, its report, each lane's d
    share / d reps, and d share / d temperature."""

    share: Tensor
    report: ContrastReport
    gradients: tuple[Tensor, ...]
    d_temperature: Tensor | None


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


@dataclass
class Report:
    """Of one lane: `sums` over masked rows and pairs by `task/name`, left on the device for the log to add up; each
    masked row's loss [M]; and for each row of the contrast (one direction's behind the other's) its `contrast` [2, R],
    loss and hit."""

    sums: dict[str, Tensor | int]
    masked: Tensor
    contrast: Tensor | None = None


class Objective(nn.Module):
    """What the engine trains: the model, its three losses and, where it is learned, the temperature."""

    def __init__(self, recipe: Recipe, model: InfoXLM) -> None:
        super().__init__()
        self.model = model
        self._contrast, self._weights, self._reduction = recipe.contrast, recipe.weights, recipe.reduction
        self._tasks, self._form = recipe.tasks, _form(recipe.contrast)
        self.temperature: Temperature | None = None
        if recipe.tasks["xlco"] and recipe.contrast.learn_temperature_within is not None:
            self.temperature = Temperature(recipe.contrast.temperature, *recipe.contrast.learn_temperature_within)

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
        if momentum is None:
            cached = self._ahead(micros, queue) if len(micros) > 1 else None
            return StepContext(denominators, pairs, queue, cached=cached)
        per_lane = [momentum.encode(self._to_device(m.keys)) for m in micros if m.keys is not None]
        sides = zip(*(reps.split(len(m.text_ids)) for reps, m in zip(per_lane, micros, strict=True)), strict=True)
        gathered = tuple(dist.gather_lanes(side) for side in sides)[::-1]  # second sides first
        ids = dist.gather_lanes([self._ids(m) for m in micros])
        return StepContext(denominators, pairs, queue, gathered, ids)

    def forward(self, batch: JointBatch, context: StepContext, slot: int) -> tuple[Tensor, Report, Tensor]:
        """The loss share of this rank's lane number `slot`, a report, and the lane's representations without
        gradient."""
        tokens, trunk = self._to_device(batch.tokens), pack(batch.tokens.lengths[: batch.trunk]).to(self._device)
        hidden, reps = self.model(tokens, trunk, batch.trunk)
        loss, report = self._masked_lm(hidden, batch, context)
        if self._tasks["xlco"]:
            share, rows = self._xlco(reps, batch, context, slot)
            weight = self._weights.xlco * context.pairs / context.denominators["xlco"]
            loss = loss + weight * share
            if rows is not None:
                report.sums |= _contrast_sums(rows)
                report.contrast = torch.stack([rows.loss, (rows.above == 0).to(rows.loss)])
        return loss, report, reps.detach()

    def _masked_lm(self, hidden: Tensor, batch: JointBatch, context: StepContext) -> tuple[Tensor, Report]:
        rows, labels = (torch.from_numpy(x).to(self._device) for x in (batch.rows, batch.labels))
        weights = torch.full((len(rows),), self._weights.tlm / context.denominators["tlm"], device=self._device)
        weights[: batch.mmlm] = self._weights.mmlm / context.denominators["mmlm"]
        loss, each = masked_lm_loss(self.model.lm, hidden[rows], labels, weights)
        report = Report({}, each)
        for task, part in (("mmlm", each[: batch.mmlm]), ("tlm", each[batch.mmlm :])):
            if self._tasks[task]:
                report.sums |= {f"{task}/loss": part.sum(), f"{task}/items": len(part)}
        return loss, report

    def _xlco(
        self, reps: Tensor, batch: JointBatch, context: StepContext, slot: int
    ) -> tuple[Tensor, ContrastReport | None]:
        if context.cached is not None:
            return self._from_cache(reps, context.cached, slot)
        if self._contrast.keys == "gradient":
            return self._between_sides(reps.chunk(2), self._temperature(), self._ids(batch), context.queue)
        return self._against_momentum_keys(reps, batch, context, slot)

    def _between_sides(
        self, sides: Sequence[Tensor], temperature: float | Tensor, ids: Tensor, queue: Keys | None
    ) -> tuple[Tensor, ContrastReport]:
        """This rank's share of the contrast of trained keys, first sides and second sides."""
        symmetric = self._contrast.symmetric
        loss, rows = contrast(sides[0], sides[1], temperature, self._form, ids=ids, queue=queue, symmetric=symmetric)
        return loss / dist.world_size(), rows  # every rank has the whole loss, and gradients times their number

    def _against_momentum_keys(
        self, reps: Tensor, batch: JointBatch, context: StepContext, slot: int
    ) -> tuple[Tensor, ContrastReport | None]:
        if context.queue is None and not self._form.in_batch:  # the queue still fills
            return finished(reps.new_zeros(()), [(x, torch.zeros_like(x)) for x in (reps, *self._learned())]), None
        assert context.ids is not None
        ids = self._ids(batch)
        own = torch.arange(len(ids), device=reps.device) + len(ids) * (slot * dist.world_size() + dist.rank())
        queries, parts = reps.split(len(ids)), []
        for query, keys in zip(queries, context.sides, strict=True):
            parts.append(
                contrast_with_keys(
                    query,
                    Keys(keys, context.ids),
                    own,
                    self._temperature(),
                    self._form,
                    ids=ids,
                    queue=context.queue,
                    total=context.pairs * len(queries),
                )
            )
        shares, rows = zip(*parts, strict=True)
        return torch.stack(shares).sum(), ContrastReport.concatenate(rows)

    def _ahead(self, micros: Sequence[JointBatch], queue: Keys | None) -> Cached:
        """Cached representations (Gao et al., 2021): encode all lanes without a graph, then one contrast over the whole
        step. The lanes' own passes then only carry the gradient back, so the contrast is as large as the step however
        few pairs fit into memory."""
        encoder = self.model.sentence_encoder()
        with torch.no_grad():
            reps = [encoder(self._to_device(_queries(m))) for m in micros]
        # fp32 from here on: a loss scale comes on the gradients later.
        wide = torch.promote_types(reps[0].dtype, torch.float32)
        first, second = (torch.cat(side).to(wide) for side in zip(*(r.chunk(2) for r in reps), strict=True))
        learned = [x.detach() for x in self._learned()]
        inputs = [x.requires_grad_() for x in (first, second, *learned)]
        temperature = learned[0] if learned else self._contrast.temperature
        ids = torch.cat([self._ids(m) for m in micros])
        with torch.enable_grad():
            share, rows = self._between_sides((first, second), temperature, ids, queue)
            d_first, d_second, *d_temperature = torch.autograd.grad(share, inputs)
        sizes = [len(m.text_ids) for m in micros]
        gradients = tuple(torch.cat(both) for both in zip(d_first.split(sizes), d_second.split(sizes), strict=True))
        return Cached(share.detach(), rows, gradients, d_temperature[0] if learned else None)

    def _from_cache(self, reps: Tensor, cached: Cached, slot: int) -> tuple[Tensor, ContrastReport | None]:
        """The lane's part. Share, report and the temperature's gradient are the whole rank's: they count once."""
        first = slot == 0
        inputs = [(reps, cached.gradients[slot])]
        if cached.d_temperature is not None:
            inputs += [(x, cached.d_temperature * first) for x in self._learned()]
        return finished(cached.share * first, inputs), cached.report if first else None

    def _temperature(self) -> float | Tensor:
        return self._contrast.temperature if self.temperature is None else self.temperature()

    def _learned(self) -> list[Tensor]:
        return [] if self.temperature is None else [self.temperature()]

    def new_keys(self, context: StepContext, micros: Sequence[JointBatch], reps: Sequence[Tensor]) -> Keys:
        """What the queue gets of this step: the second sides of all lanes and their text ids, in lane order.
        Collective.

        `micros` and `reps`: this rank's lanes and what `forward` returned for them.
        """
        vectors = context.sides[0] if context.sides else dist.gather_lanes([r.chunk(2)[1] for r in reps])
        return Keys(vectors, dist.gather_lanes([self._ids(m) for m in micros]))

    @torch.no_grad()
    def geometry(self, context: StepContext, micros: Sequence[JointBatch], reps: Sequence[Tensor]) -> dict[str, float]:
        """How the step's representations, and the queue's, lie in their space, of a sample. Collective. Arguments as of
        `new_keys`."""
        if not self._tasks["xlco"]:
            return {}
        second = self.new_keys(context, micros, reps).vectors[:SAMPLE]
        first = dist.gather_lanes([r[: len(m.text_ids)] for r, m in zip(reps, micros, strict=True)])[:SAMPLE]
        found = {
            "alignment": diagnostics.alignment(first, second),
            "effective_rank": diagnostics.effective_rank(first),
        }
        if len(first) > 1:
            found["uniformity"] = diagnostics.uniformity(first)
        if context.queue is not None:
            found["queue_effective_rank"] = diagnostics.effective_rank(context.queue.vectors[:SAMPLE])
        if self.temperature is not None:
            found["temperature"] = self.temperature()
        return {f"xlco/{name}": float(value) for name, value in found.items()}

    def _ids(self, batch: JointBatch) -> Tensor:
        return torch.from_numpy(batch.text_ids).to(self._device)

    def _to_device(self, sequences: Sequences) -> Packed:
        return packed(sequences.ids, sequences.lengths).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _queries(batch: JointBatch) -> Sequences:
    tokens = batch.tokens
    return Sequences(tokens.ids[int(tokens.lengths[: batch.trunk].sum()) :], tokens.lengths[batch.trunk :])


def _form(contrast: Contrast) -> Form:
    """Vectors come normalised from the sentence head, where the recipe wants it."""
    return Form(
        in_batch=contrast.in_batch,
        margin=contrast.margin,
        same_text=contrast.same_text,
        drop_within=contrast.drop_within,
    )


def _contrast_sums(rows: ContrastReport) -> dict[str, Tensor | int]:
    columns = rows._asdict() | {
        "hits": rows.above == 0,
        "hardest": rows.hardest.nan_to_num(neginf=0.0),  # of rows without negatives
        "log_choices": (1 + rows.negatives).log(),
    }
    return {f"xlco/{name}": values.sum() for name, values in columns.items()} | {"xlco/items": len(rows.loss)}
