"""Cross-lingual contrast (XlCo; InfoXLM, section 3.2): InfoNCE with exact gradients, at any batch, on any number of
ranks.

It runs with plain torch.distributed or in one process. Derivation and comparison: docs/contrast.md.

Legend: b pairs of this rank, N pairs of all ranks, h hard negatives of this rank, K queue, n keys, D width, I text ids
an item.

- Negatives are read in tiles; no matrix of size N x negatives exists. The positive is never added to the sum over the
  negatives, so the gradient stays precise when the loss is tiny. Computation is in float32 (float64 for float64 input).
- The forward pass runs all collectives and computes the gradients; backward only scales them, so it works under any
  sharding engine. Call backward at most once for each forward.
- Every rank gets the same loss, the mean over all pairs. The gradients are for an engine that averages over ranks (DDP,
  ZeRO): their average is the gradient of that mean, even if ranks have different numbers of pairs, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from infoxlm_ds import dist
from infoxlm_ds.losses.keys import Anchors, Block, Keys, TextIndex
from infoxlm_ds.losses.known_gradients import with_gradients
from infoxlm_ds.losses.negatives import NEVER, Fate, attract, push, sum_negatives

__all__ = ["Form", "Keys", "Report", "contrast", "contrast_with_keys"]

SameText = Literal["mask", "positive", "ignore"]


@dataclass(frozen=True)
class Form:
    """The form of the contrast.

    `in_batch`: the other pairs of the step are negatives. `margin`: subtracted from the positive's score (additive
    margin, LaBSE). `cosine`: scores are cosines, vectors are normalised here; otherwise scores are inner products
    (InfoXLM). `same_text`: keys that share a text id with the pair are left out (`mask`), are further positives
    (`positive`), or are negatives like any other (`ignore`). `drop_within`: negatives with a score above the positive's
    minus this are left out, as probable translations; None keeps all. All scores are before the temperature.
    """

    in_batch: bool = True
    margin: float = 0.0
    cosine: bool = False
    same_text: SameText = "mask"
    drop_within: float | None = None

    def __post_init__(self) -> None:
        if self.same_text not in get_args(SameText):
            raise ValueError(f"same_text is one of {', '.join(get_args(SameText))}, not {self.same_text!r}")


class Report(NamedTuple):
    """Columns [R] without gradient: one row for each anchor; the rows of the second direction follow the first's.

    `loss`: in nats; `repelled`: 1 - p(positive), the fraction of the gradient that is left; `positive`: its logit
    without margin; `hardest`: largest logit of a negative, also of a dropped one. Numbers of keys: `negatives`;
    `masked`, because they share a text; further `positives`; `dropped`, by their score; `above`: negatives
    with a logit above the positive's, with dropped ones, so that 1 + above is the positive's rank.
    """

    loss: Tensor
    repelled: Tensor
    positive: Tensor
    hardest: Tensor
    negatives: Tensor
    masked: Tensor
    positives: Tensor
    dropped: Tensor
    above: Tensor

    @staticmethod
    def concatenate(reports: Sequence[Report]) -> Report:
        """The rows of all reports, in their order."""
        return Report(*(torch.cat(column) for column in zip(*reports, strict=True)))


def contrast(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    form: Form = Form(),
    *,
    ids: Tensor | None = None,
    queue: Keys | None = None,
    hard: Keys | None = None,
    symmetric: bool = False,
    key_gradient: bool = True,
    group: dist.Group = None,
) -> tuple[Tensor, Report]:
    """The contrast of pairs (query [b, D], key [b, D]): the mean loss over the pairs of all ranks, [], and this rank's
    report. Collective: all ranks of `group` call it with the same options and b >= 0 pairs each.

    - ids [b, I]: text ids, int64, on the host; for items that share one see `form.same_text`.
    - queue: older keys, the same on every rank, or each rank's part of them. They get no gradient.
    - hard: this rank's hard negatives [h, D], h >= 0; they are negatives of every query of every rank.
    - symmetric: average with the contrast from key to query, which does not use the hard negatives.
    - key_gradient: whether key and hard negatives get a gradient; query and a temperature tensor [] always get one.

    ValueError if shapes do not fit, a float temperature is not above 0, or there are no negatives.
    """
    _check(query, key, temperature, form, ids, queue, hard, symmetric)
    ids = _ids(ids, query, form)
    sides = [_wide(query, form), _wide(key, form)]
    more = _keys(hard, _wide(hard.vectors, form), form) if hard is not None else None
    with _exact(query.device):
        step = _Step(sides, ids, more, queue, temperature, form, key_gradient, group)
        turns = [step.direction(turn) for turn in ((0, 1) if symmetric else (0,))]
        weight = 1 / (max(1, step.pairs) * len(turns))
        report = Report.concatenate([turn.report for turn in turns])
        loss = dist.sum_over_ranks(report.loss.sum() * weight, group)
    tensors = [*sides, more.vectors if more is not None else None]
    inputs = [(x, d) for x, d in zip(tensors, step.gradients, strict=True) if x is not None and d is not None]
    if isinstance(temperature, Tensor):
        inputs.append((temperature, torch.stack([turn.d_temperature for turn in turns]).sum()))
    averaged = weight * dist.world_size(group)
    return with_gradients(loss, [(x, gradient.mul_(averaged)) for x, gradient in inputs]), report


def contrast_with_keys(
    query: Tensor,
    keys: Keys,
    own: int,
    temperature: float | Tensor,
    form: Form = Form(),
    *,
    ids: Tensor | None = None,
    queue: Keys | None = None,
    hard: Keys | None = None,
    total: int,
    group: dist.Group = None,
) -> tuple[Tensor, Report]:
    """The contrast of query [b, D] with keys [n, D] and hard negatives that are gathered already and get no gradient
    (MoCo's form). The positive of row i is `keys[own + i]`. So a caller that splits a step into parts computes the keys
    once.

    Returns this part's share of the loss, the sum over its own rows divided by `total`, and its report. Shares and
    their gradients add up over parts and ranks. Collective only if the queue is sharded. Otherwise like `contrast`.
    """
    _check_keys("keys", keys.vectors, keys.ids, query)
    positives = slice(own, own + len(query))
    _check(query, keys.vectors[positives], temperature, form, ids, queue, hard, symmetric=False)
    ids, wide = _ids(ids, query, form), _wide(query, form)
    with _exact(query.device):
        vectors = _wide(keys.vectors, form)
        in_batch = _keys(keys, vectors, form) if form.in_batch else None
        more = _keys(hard, _wide(hard.vectors, form), form) if hard is not None else None
        blocks = _blocks(form, in_batch, own, more, queue)
        direction = _direct(wide, vectors[positives], ids, blocks, temperature, form, group)
    inputs = [(wide, direction.gradient / total)]
    if isinstance(temperature, Tensor):
        inputs.append((temperature, direction.d_temperature / total))
    return with_gradients(direction.report.loss.sum() / total, inputs), direction.report


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 products in float32: neither autocast nor TF32, whatever the caller allows elsewhere.
    The tolerance of `drop_within` is in units of float32's rounding."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision  # unlike `allow_tf32`, it can be read whichever of the two the caller has set
    matmul.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = allowed


QUERY, HARD = 0, 2  # places in `_Step.gradients`; 1 is the keys'


class _Direction(NamedTuple):
    """One direction: its rows, and the derivatives of its summed loss, `gradient` [b, D] by the anchors before the
    scale and `d_temperature` []. `attracted` [b]: how strongly each anchor pulls its own target. `fate` [b, 4 or 5]:
    see `negatives.Fate`."""

    report: Report
    anchors: Anchors
    gradient: Tensor
    d_temperature: Tensor
    attracted: Tensor
    fate: Tensor


class _Step:
    """The pairs of all ranks, gathered when a direction needs them, and `gradients`: the derivatives of the sum of all
    losses by this rank's queries, keys and hard negatives."""

    def __init__(
        self,
        sides: list[Tensor],
        ids: Tensor,
        hard: Keys | None,
        queue: Keys | None,
        temperature: float | Tensor,
        form: Form,
        key_gradient: bool,
        group: dist.Group,
    ) -> None:
        self._sides, self._ids, self._hard, self._queue = sides, ids, hard, queue
        self._temperature, self._form, self._key_gradient, self._group = temperature, form, key_gradient, group
        self._counts = dist.row_counts(ids, group)
        self.pairs = sum(self._counts)
        self._own = dist.own_rows(self._counts, group).start
        self._gathered: dict[int, Tensor] = {}
        self._texts = TextIndex(self._gather(ids))  # of both sides' items
        self._all_hard = self._hard_of_all_ranks()
        self.gradients: list[Tensor | None] = [None, None, None]

    def direction(self, turn: int) -> _Direction:
        """The contrast from queries to keys (turn 0) or from keys to queries (turn 1). Adds to the gradients."""
        form, target = self._form, self._sides[1 - turn]
        keys = Keys.indexed(self._everyone(1 - turn), self._texts) if form.in_batch else None
        blocks = _blocks(form, keys, self._own, self._all_hard if turn == 0 else None, self._queue)
        direction = _direct(self._sides[turn], target, self._ids, blocks, self._temperature, form, self._group)
        self._add(turn, direction.gradient)
        if turn == 1 or self._key_gradient:
            self._add(1 - turn, -direction.attracted[:, None] * direction.anchors.vectors)
            self._push(turn, direction)
        return direction

    def _add(self, number: int, gradient: Tensor) -> None:
        if number != QUERY and not self._key_gradient:
            return
        before = self.gradients[number]
        self.gradients[number] = gradient if before is None else before.add_(gradient)

    def _push(self, turn: int, direction: _Direction) -> None:
        """Add the gradients of keys that are negatives or further positives of the anchors of all ranks."""
        hard = self._hard if turn == 0 else None
        if not self._form.in_batch and hard is None:
            return
        scale, margin, _ = _logits(self._temperature, self._form, direction.gradient.dtype)
        fate, anchors = Fate(*self._gather(direction.fate).unbind(1)), scale * self._everyone(turn)
        attracts = self._form.same_text == "positive"
        if self._form.in_batch:
            targets = Keys(self._sides[1 - turn], self._ids)
            self._add(1 - turn, push(targets, self._own, anchors, self._texts, fate, margin, attracts))
        if hard is not None:
            self._add(HARD, push(hard, None, anchors, self._texts, fate, margin, attracts=False))

    def _gather(self, rows: Tensor) -> Tensor:
        return dist.gather_rows(rows, self._counts, self._group)

    def _everyone(self, side: int) -> Tensor:
        if side not in self._gathered:
            self._gathered[side] = self._gather(self._sides[side])
        return self._gathered[side]

    def _hard_of_all_ranks(self) -> Keys | None:
        if self._hard is None:
            return None
        counts = dist.row_counts(self._hard.ids, self._group)
        vectors, ids = (dist.gather_rows(x, counts, self._group) for x in (self._hard.vectors, self._hard.ids))
        return Keys(vectors, ids)


def _direct(
    anchor: Tensor,
    target: Tensor,
    ids: Tensor,
    blocks: list[Block],
    temperature: float | Tensor,
    form: Form,
    group: dist.Group,
) -> _Direction:
    """Contrast each row of anchor [b, D] with its positive, the same row of target [b, D], and the negatives in the
    blocks."""
    scale, margin, within = _logits(temperature, form, anchor.dtype)
    vectors = scale * anchor
    positive, cut = (vectors * target).sum(1), None
    if form.drop_within is not None:
        # Scores of equal vectors differ by rounding between tiles. With this tolerance all are cut, or none.
        rounding = 16 * torch.finfo(positive.dtype).eps * (1 + vectors.norm(dim=1) * target.norm(dim=1))
        cut = positive - within - rounding
    anchors = Anchors(vectors, ids, positive, cut)
    sums = sum_negatives(anchors, blocks, group)
    away = sums.shift - positive + sums.mass.log() + margin  # L - p in docs/contrast.md, with the margin
    loss, attracted = softplus(away, threshold=NEVER), torch.sigmoid(away)
    repelled, per_positive, mean_key = attracted, torch.ones_like(loss), sums.mean_key
    pulled, positives = attracted * (positive - margin), torch.zeros_like(sums.shared)
    gradient = (mean_key - target).mul_(attracted[:, None])  # subtract first: at the start all vectors are similar
    if form.same_text == "positive":
        extra = attract(anchors, sums.log_sum, margin, blocks, group)
        positives, per_positive = extra.positives, 1 / (1 + extra.positives.to(loss.dtype))
        loss = per_positive * (loss + extra.loss)
        attracted = per_positive * attracted
        pulled = per_positive * (pulled + extra.logit)
        repelled = attracted + per_positive * extra.repelled
        gradient += extra.repelled[:, None] * mean_key - extra.pulled
        gradient *= per_positive[:, None]
    d_log_scale = repelled @ torch.einsum("bd,bd->b", vectors, mean_key) - pulled.sum()
    masked, negatives = sums.shared - positives, sums.keys - sums.shared - sums.dropped
    report = Report(loss, repelled, positive, sums.hardest, negatives, masked, positives, sums.dropped, sums.above)
    fate = [sums.shift, sums.mass.log(), repelled.log(), per_positive, *([] if cut is None else [cut])]
    return _Direction(report, anchors, gradient.mul_(scale), -scale * d_log_scale, attracted, torch.stack(fate, 1))


def _blocks(form: Form, keys: Keys | None, own: int, hard: Keys | None, queue: Keys | None) -> list[Block]:
    blocks = [Block(keys, own)] if keys is not None else []
    blocks += [Block(hard, attracts=False)] if hard is not None else []
    blocks += [Block(_keys(queue, queue.vectors, form), unit=form.cosine)] if queue is not None else []
    return blocks


def _keys(keys: Keys, vectors: Tensor, form: Form) -> Keys:
    """The keys with other vectors, and with no texts where those are ignored."""
    if form.same_text == "ignore":
        return Keys(vectors, _ids(None, vectors, form), keys.sharded)
    return Keys.indexed(vectors, keys.texts, keys.sharded)


def _wide(x: Tensor, form: Form) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return normalize(x, dim=1) if form.cosine else x


def _logits(temperature: float | Tensor, form: Form, dtype: torch.dtype) -> tuple[float | Tensor, ...]:
    """The scale s = 1 / temperature, and margin and `drop_within` times s, rounded to `dtype`. Numbers stay numbers, so
    that nothing is uploaded."""
    scale = 1 / torch.as_tensor(temperature, dtype=dtype)
    values = (scale, scale * form.margin, scale * (form.drop_within or 0.0))
    return values if isinstance(temperature, Tensor) else tuple(map(float, values))


def _ids(ids: Tensor | None, vectors: Tensor, form: Form) -> Tensor:
    if ids is None or form.same_text == "ignore":
        return torch.zeros(len(vectors), 0, dtype=torch.int64)
    return ids


def _check(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    form: Form,
    ids: Tensor | None,
    queue: Keys | None,
    hard: Keys | None,
    symmetric: bool,
) -> None:
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            raise ValueError(f"a temperature tensor must be a scalar [], not {list(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}")
    if query.ndim != 2 or query.shape != key.shape or query.dtype != key.dtype:
        given = " and ".join(f"{x.dtype} {list(x.shape)}" for x in (query, key))
        raise ValueError(f"query and key must both be [pairs, width] of one dtype, not {given}")
    if not form.in_batch and queue is None and (hard is None or symmetric):
        raise ValueError("there are no negatives: give a queue or, for one direction, hard negatives, or set in_batch")
    if ids is not None:
        _check_keys("ids", query, ids, query)
    for name, keys in (("queue", queue), ("hard", hard)):
        if keys is not None:
            _check_keys(name, keys.vectors, keys.ids, query)


def _check_keys(name: str, vectors: Tensor, ids: Tensor, query: Tensor) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != query.shape[1]:
        raise ValueError(f"{name}: vectors must be [keys, {query.shape[1]}], not {list(vectors.shape)}")
    if ids is None or ids.shape[:1] != vectors.shape[:1] or ids.ndim != 2 or ids.dtype != torch.int64:
        given = "None" if ids is None else f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(f"{name}: text ids must be int64 [{len(vectors)}, texts], not {given}")
    if ids.device.type != "cpu":
        raise ValueError(f"{name}: text ids must be on the host, not on {ids.device}: they are compared there")
