"""Cross-lingual contrast (InfoXLM, section 3.2): InfoNCE with negatives from a queue, from the whole step, or both.

Legend: b pairs at hand, N pairs of all lanes and ranks, n keys of a block, D width, I text ids an item.

With S_ij = q_i.k_j / temperature, p_i the logit of the positive and L_i the log-sum-exp over the negatives of row i,
the loss is softplus(L_i - p_i). The positive never enters a sum of ten thousand terms, so the gradient keeps its
precision when the loss is tiny. Negatives are read in tiles; nothing of size N x negatives exists. Gradients are
finished in forward, as are all collectives, and backward only scales them. Inside, everything is float32 (float64 for
float64 input).

Every function returns this caller's *share*: the sum over its own rows divided by N. Shares and their gradients add up,
over lanes and ranks, to the mean over all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from infoxlm_ds import dist

TILE_ROWS, TILE_KEYS = 256, 1024  # 1 MiB of float32: a tile stays in the second-level cache


class Keys(NamedTuple):
    """A block of keys [n, D] and the text ids of their items [n, I]. Items that share an id are never negatives of
    each other."""

    vectors: Tensor
    ids: Tensor


@dataclass(frozen=True)
class ContrastReport:
    """A row each [b], without gradient: the `loss`, the logit of the `positive` and of the `hardest` negative, and how
    many keys were `negatives` and how many were `masked` because they share a text with the pair."""

    loss: Tensor
    positive: Tensor
    hardest: Tensor
    negatives: Tensor
    masked: Tensor


class _Direction(NamedTuple):
    report: ContrastReport
    gradient: Tensor  # [b, D] of the sum of losses with respect to the query
    repelled: Tensor  # [b] 1 - p(positive), the share of the gradient that is left
    log_total: Tensor  # [b] log-sum-exp over the positive and the negatives


def contrast(
    query: Tensor,
    keys: Keys,
    own: Tensor,
    *,
    ids: Tensor,
    temperature: float,
    total: int,
    in_batch: bool,
    queue: Keys | None,
) -> tuple[Tensor, ContrastReport]:
    """Contrast of query [b, D] with keys without gradient (MoCo's form): row i belongs to `keys[own[i]]`.

    `ids` [b, I] are the items' text ids; `in_batch` makes the other keys negatives; `queue` adds older ones. `total`
    is N.
    """
    one = _direction(query.detach(), keys, own, ids, 1 / temperature, in_batch, queue)
    share = with_gradients(one.report.loss.sum() / total, (query, one.gradient / total))
    return share, one.report


def contrast_gradients(
    query: Tensor, key: Tensor, *, ids: Tensor, temperature: float, symmetric: bool, queue: Keys | None
) -> tuple[Tensor, Tensor, Tensor, list[ContrastReport]]:
    """The share and its gradients with respect to query and key, both [b, D], each rank with its own rows: row i of one
    belongs to row i of the other, and the other pairs of all ranks are negatives. `symmetric`: the mean of both
    directions.

    Collectives: the vectors and ids are gathered, then one number a row and direction, which is all that a key's
    gradient needs.
    """
    scale = 1 / temperature
    all_query, all_key, all_ids = (dist.gather_rows(x.detach()) for x in (query, key, ids))
    own = torch.arange(len(query), device=query.device) + dist.rank() * len(query)
    sides = [(query.detach(), all_query, key.detach(), all_key)]
    if symmetric:
        sides.append((key.detach(), all_key, query.detach(), all_query))
    wide = torch.promote_types(query.dtype, torch.float32)
    d_sides = [torch.zeros_like(side, dtype=wide) for side in (query, key)]
    reports, share = [], query.new_zeros((), dtype=wide)
    weight = 1 / (len(all_query) * len(sides))
    for turn, (anchor, all_anchor, target, all_target) in enumerate(sides):
        one = _direction(anchor, Keys(all_target, all_ids), own, ids, scale, True, queue)
        log_total = dist.gather_rows(one.log_total)
        pushed = _pushed(Keys(target, ids), own, Keys(all_anchor, all_ids), log_total, scale)
        d_sides[turn] += weight * one.gradient
        d_sides[1 - turn] += weight * scale * (pushed - one.repelled[:, None] * anchor)
        share = share + weight * one.report.loss.sum()
        reports.append(one.report)
    return share, d_sides[0], d_sides[1], reports


def with_gradients(share: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`share` as a loss: of each pair (tensor, gradient), backward hands the gradient times the incoming one to the
    tensor."""
    tensors, gradients = zip(*pairs, strict=True)
    result: Tensor = _Finished.apply(share, len(pairs), *tensors, *gradients)  # type: ignore[no-untyped-call]
    return result


def _direction(
    query: Tensor, keys: Keys, own: Tensor, ids: Tensor, scale: float, in_batch: bool, queue: Keys | None
) -> _Direction:
    wide = torch.promote_types(query.dtype, torch.float32)
    query, vectors = query.to(wide), keys.vectors.to(wide)
    target = vectors[own]
    positive = scale * (query * target).sum(1)
    blocks = [(Keys(vectors, keys.ids), True)] if in_batch else []
    blocks += [(queue, False)] if queue is not None else []
    tiles = (slice(start, start + TILE_ROWS) for start in range(0, len(query), TILE_ROWS))
    parts = [_rows(query[tile], ids[tile], own[tile], blocks, scale) for tile in tiles]
    log_sum, mean_key, hardest, negatives, masked = (torch.cat(column) for column in zip(*parts, strict=True))
    repelled = torch.sigmoid(log_sum - positive)
    gradient = scale * repelled[:, None] * (mean_key - target)
    report = ContrastReport(softplus(log_sum - positive, threshold=50), positive, hardest, negatives, masked)
    return _Direction(report, gradient, repelled, torch.logaddexp(log_sum, positive))


def _rows(
    query: Tensor, ids: Tensor, own_rows: Tensor, blocks: Sequence[tuple[Keys, bool]], scale: float
) -> tuple[Tensor, ...]:
    """One tile of rows against all blocks, by the running maximum of flash attention with the keys as values."""
    hardest = query.new_full((len(query),), -torch.inf)
    mass, weighted = torch.zeros_like(hardest), torch.zeros_like(query)
    negatives = torch.zeros_like(own_rows)
    masked = torch.zeros_like(own_rows)
    for keys, has_positive in blocks:
        for start in range(0, len(keys.vectors), TILE_KEYS):
            part = keys.vectors[start : start + TILE_KEYS].to(query.dtype)
            excluded = shares_text(ids, keys.ids[start : start + TILE_KEYS])
            if has_positive:
                positive = _columns(own_rows, start, len(part))
                masked += (excluded & ~positive).sum(1)
                excluded |= positive
            else:
                masked += excluded.sum(1)
            negatives += (~excluded).sum(1)
            logits = torch.mm(query, part.t()).mul_(scale).masked_fill_(excluded, -torch.inf)
            highest = torch.maximum(hardest, logits.amax(1))
            shift = highest.nan_to_num(neginf=0.0)  # a row whose keys are all masked so far has no maximum
            logits.sub_(shift[:, None]).exp_()
            decay = (hardest - shift).exp()
            mass = mass * decay + logits.sum(1)
            weighted = torch.addmm(weighted * decay[:, None], logits, part)
            hardest = highest
    log_sum = hardest + mass.clamp_min(torch.finfo(mass.dtype).tiny).log()
    mean_key = weighted / mass.clamp_min(torch.finfo(mass.dtype).tiny)[:, None]
    return log_sum, mean_key, hardest, negatives, masked


def _columns(own: Tensor, start: int, count: int) -> Tensor:
    """Where columns start .. start + count of a block hold the rows' own positives, [b, count] bool."""
    return own[:, None] == torch.arange(start, start + count, device=own.device)


def _pushed(keys: Keys, own: Tensor, queries: Keys, log_total: Tensor, scale: float) -> Tensor:
    """Sum over all queries i that have key j as a negative of softmax_ij q_i, [b, D]: how the anchors push the keys
    away."""
    wide = torch.promote_types(keys.vectors.dtype, torch.float32)
    vectors, sums = keys.vectors.to(wide), []
    for first in range(0, len(vectors), TILE_ROWS):
        rows = slice(first, first + TILE_ROWS)
        pushed = torch.zeros_like(vectors[rows])
        for start in range(0, len(queries.vectors), TILE_KEYS):
            part = queries.vectors[start : start + TILE_KEYS].to(wide)
            same = shares_text(keys.ids[rows], queries.ids[start : start + TILE_KEYS])
            same |= _columns(own[rows], start, len(part))
            softmax = (scale * vectors[rows] @ part.t() - log_total[None, start : start + TILE_KEYS]).exp_()
            pushed = torch.addmm(pushed, softmax.masked_fill_(same, 0.0), part)
        sums.append(pushed)
    return torch.cat(sums) if sums else torch.zeros_like(vectors)


def shares_text(ids: Tensor, other: Tensor) -> Tensor:
    """Whether item i of `ids` [m, I] and item j of `other` [n, I] have a text in common, [m, n] bool."""
    same = torch.zeros(len(ids), len(other), dtype=torch.bool, device=ids.device)
    for mine in ids.unbind(1):
        for theirs in other.unbind(1):
            same |= mine[:, None] == theirs[None, :]
    return same


class _Finished(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*(g.to(t.dtype) for t, g in zip(tensors[:count], tensors[count:], strict=True)))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, None, *(g * d_value.to(g.dtype) for g in gradients), *(None for _ in gradients)
