"""The tiles of the contrast: sums over a row's many negatives and over a key's many anchors. No more than one tile of
logits is in memory. Derivation: docs/contrast.md.

Legend: b anchors, n keys of a block, m rows and t keys of a tile, D width, I text ids of an item. Anchors are already
multiplied by the scale s = 1 / temperature, so an inner product is a logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from infoxlm_ds import dist

# Rows and keys of a tile. On a CPU a tile (2 MiB of float32) fits the second-level cache; a GPU needs large tiles.
TILES = {"cpu": (512, 1024)}
LARGE_TILES = (4096, 8192)
HEADROOM = 40.0  # exp(40) times a billion keys is far below the largest float32
NEVER = 50.0  # softplus' threshold; torch's default, 20, makes an error of 2e-9


class TextIndex:
    """Text ids [n, I] of keys, sorted, to find the keys that share a text with given items."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._texts, order = ids.flatten().sort()
        self._key_of = order // max(1, ids.shape[1])

    def sharing(self, ids: Tensor) -> Tensor:
        """Sorted numbers of the few keys that share a text with any of these items: only these are compared."""
        wanted = ids.unique()
        first = torch.searchsorted(self._texts, wanted)
        count = torch.searchsorted(self._texts, wanted, right=True) - first
        before = count.cumsum(0) - count
        places = torch.arange(int(count.sum()), device=ids.device) + torch.repeat_interleave(first - before, count)
        return self._key_of[places].unique()


@dataclass(frozen=True)
class Keys:
    """Keys [n, D] and the text ids of their items [n, I], int64. `sharded`: each rank holds a part of them.

    `texts` is computed on first use and kept, so one object should serve as long as its keys do not change.
    """

    vectors: Tensor
    ids: Tensor
    sharded: bool = False

    @cached_property
    def texts(self) -> TextIndex:
        return TextIndex(self.ids)

    @staticmethod
    def indexed(vectors: Tensor, texts: TextIndex, sharded: bool = False) -> Keys:
        """Keys of items whose index exists already."""
        keys = Keys(vectors, texts.ids, sharded)
        keys.__dict__["texts"] = texts
        return keys


class Anchors(NamedTuple):
    """Rows of one side. `vectors` [b, D]: times the scale; `ids` [b, I]: text ids; `positive` [b]: logit of each row's
    own positive, without margin; `cut` [b]: negatives with this logit or a larger one are dropped."""

    vectors: Tensor
    ids: Tensor
    positive: Tensor
    cut: Tensor

    def rows(self, part: slice) -> Anchors:
        return Anchors(*(column[part] for column in self))

    def of_all_ranks(self, counts: list[int], group: dist.Group) -> Anchors:
        return Anchors(*(dist.gather_rows(column, counts, group) for column in self))


class Block:
    """Keys that anchors are compared with."""

    def __init__(self, keys: Keys, own: Tensor | None = None, *, unit: bool = False, attracts: bool = True) -> None:
        """`own` [b]: the number of each anchor's positive, if the block holds them; `unit`: divide the keys by their
        norms; `attracts`: keys that share a text may be further positives."""
        self.vectors, self.texts, self.sharded = keys.vectors, keys.texts, keys.sharded
        self.own, self._unit, self.attracts = own, unit, attracts

    def __len__(self) -> int:
        return len(self.vectors)

    def part(self, chosen: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Some of the keys, in the anchors' dtype."""
        vectors = self.vectors[chosen].to(dtype)
        return normalize(vectors, dim=1) if self._unit else vectors


@dataclass
class Sums:
    """Sums over the negatives of rows [b].

    `mass`: sum of exp(logit - shift); `weighted` [b, D]: sum of exp(logit - shift) times the key; `hardest`: largest
    logit. Numbers of keys: `keys` in all; `shared`: share a text; `above`: have a logit above the positive's;
    `dropped`: by the cut.
    """

    shift: Tensor
    mass: Tensor
    weighted: Tensor
    hardest: Tensor
    keys: Tensor
    shared: Tensor
    above: Tensor
    dropped: Tensor

    @staticmethod
    def none(anchors: Anchors) -> Sums:
        """Sums over no negative. The shift starts at the positive's logit: then `log mass` is the difference that the
        loss needs, without cancellation."""
        zero, count = torch.zeros_like(anchors.positive), torch.zeros_like(anchors.positive, dtype=torch.int64)
        counts = (count.clone() for _ in range(4))
        lowest = torch.full_like(zero, -torch.inf)
        return Sums(anchors.positive.clone(), zero, torch.zeros_like(anchors.vectors), lowest, *counts)

    ADDED: ClassVar = ("mass", "weighted", "keys", "shared", "above", "dropped")

    @property
    def log_sum(self) -> Tensor:
        """Log-sum-exp over the negatives; -inf if there are none."""
        return self.shift + self.mass.log()

    @property
    def mean_key(self) -> Tensor:
        """Mean of the negative keys, weighted with their softmax, [b, D]."""
        return self.weighted / self.mass.clamp_min(torch.finfo(self.mass.dtype).tiny)[:, None]

    def move(self, by: Tensor) -> None:
        """Add to the shift. `by` may be negative only where there is no mass."""
        factor = torch.where(self.mass > 0, (-by).exp(), 0.0)
        self.shift, self.mass, self.weighted = self.shift + by, self.mass * factor, self.weighted * factor[:, None]

    def move_to(self, shift: Tensor) -> None:
        """Set the shift. Where the new one is -inf (no negative on any rank), keep the old one."""
        self.move(torch.where(shift == -torch.inf, 0.0, shift - self.shift))


def sum_negatives(anchors: Anchors, blocks: list[Block], group: dist.Group = None) -> Sums:
    """Sums over all blocks for all anchors. Collective if a block is sharded."""
    sums = _sum_local(anchors, [block for block in blocks if not block.sharded])
    for block in blocks:
        if block.sharded:
            sums = _merged(sums, _sum_sharded(anchors, block, group))
    return sums


def _sum_local(anchors: Anchors, blocks: list[Block]) -> Sums:
    parts = [_sum_rows(anchors.rows(rows), rows, blocks) for rows in _row_tiles(anchors)]
    return Sums(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def _sum_rows(anchors: Anchors, rows: slice, blocks: list[Block]) -> Sums:
    sums = Sums.none(anchors)
    for block in blocks:
        own = None if block.own is None else block.own[rows]
        sharing = block.texts.sharing(anchors.ids)
        for part in _key_tiles(block):
            keys = block.part(part, anchors.vectors.dtype)
            logits = torch.addmm(sums.shift[:, None], anchors.vectors, keys.t(), beta=-1)
            sums.shared += _leave_out(logits, anchors.ids, block, sharing, part, own)
            _add(sums, logits, keys, anchors)
        sums.keys += len(block) - (own is not None)
    return sums


def _leave_out(
    logits: Tensor, ids: Tensor, block: Block, sharing: Tensor, part: slice, own: Tensor | None
) -> Tensor | int:
    """Set the logits of the rows' own positives, and of keys that share a text, to -inf in a tile. Returns the number
    of the latter for each row."""
    count: Tensor | int = 0
    ends = torch.searchsorted(sharing, torch.tensor([part.start, part.stop], device=ids.device)).tolist()
    columns = sharing[slice(*ends)]
    if len(columns):
        same = _others_sharing(ids, block, columns, own)
        count = same.sum(1)
        logits[:, columns - part.start] = logits[:, columns - part.start].masked_fill_(same, -torch.inf)
    if own is not None:
        column = (own - part.start)[:, None]
        inside, place = (column >= 0) & (column < logits.shape[1]), column.clamp(0, logits.shape[1] - 1)
        logits.scatter_(1, place, logits.gather(1, place).masked_fill(inside, -torch.inf))
    return count


def _add(sums: Sums, logits: Tensor, keys: Tensor, anchors: Anchors) -> None:
    """Add a tile of logits minus shift, [m, t], to the sums. Overwrites the tile."""
    top = logits.amax(1)
    sums.hardest = torch.maximum(sums.hardest, top + sums.shift)
    positive = anchors.positive - sums.shift
    if bool((top >= positive).any()):
        # The result is a float tensor: on a CPU, a comparison that makes bools takes three times as long.
        sums.above += torch.ge(logits, positive[:, None], out=torch.empty_like(logits)).sum(1).long()
    cut = anchors.cut - sums.shift
    if bool((top >= cut).any()):
        over = logits >= cut[:, None]
        sums.dropped += over.sum(1)
        top = logits.masked_fill_(over, -torch.inf).amax(1)
    far = (top > HEADROOM) | ((top < -HEADROOM) & (top > -torch.inf) & (sums.mass == 0))
    if bool(far.any()):
        by = torch.where(far, top, 0.0)
        sums.move(by)
        logits.sub_(by[:, None])
    logits.exp_()
    sums.mass += logits.sum(1)
    sums.weighted.addmm_(logits, keys)


def _merged(first: Sums, other: Sums) -> Sums:
    highest = torch.maximum(first.log_sum, other.log_sum)
    for sums in (first, other):
        sums.move_to(highest)
    added = {name: getattr(first, name) + getattr(other, name) for name in Sums.ADDED}
    return Sums(shift=first.shift, hardest=torch.maximum(first.hardest, other.hardest), **added)


def _sum_sharded(anchors: Anchors, block: Block, group: dist.Group) -> Sums:
    """Every rank compares the anchors of all ranks with its part of the keys; the sums are then added over ranks."""
    counts = dist.row_counts(anchors.ids, group)
    sums = _sum_local(anchors.of_all_ranks(counts, group), [block])
    sums.move_to(dist.max_over_ranks(sums.log_sum, group))
    dist.max_over_ranks(sums.hardest, group)
    for name in Sums.ADDED:
        dist.sum_over_ranks(getattr(sums, name), group)
    own = dist.own_rows(counts, group)
    return Sums(*(column[own] for column in vars(sums).values()))


class Attraction(NamedTuple):
    """Sums over the further positives of rows [b], which are keys that share a text with them. `positives`: their
    number; `loss`: sum of their losses; `repelled`: sum of their weights w = 1 - p; `logit`: sum of w times the logit;
    `pulled` [b, D]: sum of w times the key."""

    positives: Tensor
    loss: Tensor
    repelled: Tensor
    logit: Tensor
    pulled: Tensor

    @staticmethod
    def none(vectors: Tensor) -> Attraction:
        zero = vectors.new_zeros(len(vectors))
        return Attraction(zero.long(), zero, zero, zero, torch.zeros_like(vectors))


def attract(
    anchors: Anchors, log_sum: Tensor, margin: float | Tensor, blocks: list[Block], group: dist.Group = None
) -> Attraction:
    """Contrast each further positive with the negatives only, whose log-sum-exp is `log_sum` [b]. `margin`: in logits.
    Collective if a block is sharded."""
    blocks = [block for block in blocks if block.attracts]
    total = _attract_local(anchors, log_sum, margin, [block for block in blocks if not block.sharded])
    for block in blocks:
        if block.sharded:
            counts = dist.row_counts(anchors.ids, group)
            everyone = anchors.of_all_ranks(counts, group)
            part = _attract_local(everyone, dist.gather_rows(log_sum, counts, group), margin, [block])
            own = dist.own_rows(counts, group)
            total = Attraction(*(a + dist.sum_over_ranks(b, group)[own] for a, b in zip(total, part, strict=True)))
    return total


def _attract_local(anchors: Anchors, log_sum: Tensor, margin: float | Tensor, blocks: list[Block]) -> Attraction:
    parts = [_attract_rows(anchors.rows(rows), rows, log_sum[rows], margin, blocks) for rows in _row_tiles(anchors)]
    return Attraction(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _attract_rows(
    anchors: Anchors, rows: slice, log_sum: Tensor, margin: float | Tensor, blocks: list[Block]
) -> Attraction:
    total = Attraction.none(anchors.vectors)
    for block in blocks:
        own = None if block.own is None else block.own[rows]
        sharing = block.texts.sharing(anchors.ids)
        for columns in sharing.split(_sizes(sharing)[1]):
            same = _others_sharing(anchors.ids, block, columns, own)
            keys = block.part(columns, anchors.vectors.dtype)
            logits = anchors.vectors @ keys.t() - margin
            away = log_sum[:, None] - logits
            weight = torch.sigmoid(away).masked_fill(~same, 0.0)
            losses = softplus(away, threshold=NEVER).masked_fill(~same, 0.0)
            part = (same.sum(1), losses.sum(1), weight.sum(1), (weight * logits).sum(1), weight @ keys)
            total = Attraction(*(a + b for a, b in zip(total, part, strict=True)))
    return total


class Fate(NamedTuple):
    """Values of all anchors [N] that the keys' gradients need in addition to the anchors' vectors.

    `shift` + `log_mass`: log-sum-exp over the negatives; `log_repels`: log(1 - p); `per_positive`: 1 / number of
    positives.
    """

    shift: Tensor
    log_mass: Tensor
    log_repels: Tensor
    per_positive: Tensor


def push(
    keys: Keys,
    own: Tensor | None,
    anchors: Anchors,
    texts: TextIndex,
    fate: Fate,
    margin: float | Tensor,
    attracts: bool,
) -> Tensor:
    """The derivative of the sum of the anchors' losses by the keys, [n, D]. The keys are the anchors' negatives and, if
    `attracts`, further positives. `own` [n]: the number of each key's own anchor of [N], which is left out. `texts`:
    the index of the anchors' texts."""
    block = Block(Keys.indexed(anchors.vectors, texts), own)
    vectors, sums = keys.vectors.to(anchors.vectors.dtype), []
    total = fate.log_mass.clamp_min(torch.finfo(fate.log_mass.dtype).min)  # it is -inf for an anchor without negatives
    for rows in _row_tiles(keys):
        ids, own_rows, sharing = keys.ids[rows], None if own is None else own[rows], block.texts.sharing(keys.ids[rows])
        pushed = torch.zeros_like(vectors[rows])
        for part in _key_tiles(block):
            # Computed in the same layout as the rows' sums, so that it rounds alike.
            logits = torch.addmm(fate.shift[part, None], anchors.vectors[part], vectors[rows].t(), beta=-1)
            _leave_out(logits.t(), ids, block, sharing, part, own_rows)
            logits.masked_fill_(logits >= (anchors.cut - fate.shift)[part, None], -torch.inf)
            logits.sub_(total[part, None]).clamp_max_(0.0)  # a term cannot exceed the sum, except by rounding
            pushed.addmm_(logits.add_(fate.log_repels[part, None]).exp_().t(), anchors.vectors[part])
        for columns in sharing.split(_sizes(sharing)[1]) if attracts else ():
            same = _others_sharing(ids, block, columns, own_rows)
            logits = torch.addmm(fate.shift[columns, None], anchors.vectors[columns], vectors[rows].t(), beta=-1)
            away = fate.log_mass[None, columns] - logits.t() + margin
            weight = (torch.sigmoid(away) * fate.per_positive[None, columns]).masked_fill_(~same, 0.0)
            pushed.addmm_(weight, anchors.vectors[columns], alpha=-1)
        sums.append(pushed)
    return torch.cat(sums)


def shares_text(ids: Tensor, other: Tensor) -> Tensor:
    """Whether item i of `ids` [m, I] and item j of `other` [n, I] share a text, [m, n] bool."""
    same = torch.zeros(len(ids), len(other), dtype=torch.bool, device=ids.device)
    for first in ids.unbind(1):
        for second in other.unbind(1):
            same |= first[:, None] == second[None, :]
    return same


def _others_sharing(ids: Tensor, block: Block, columns: Tensor, own: Tensor | None) -> Tensor:
    """Whether a key shares a text with a row and is not the row's own positive, [m, len(columns)]."""
    same = shares_text(ids, block.texts.ids[columns])
    return same if own is None else same & (own[:, None] != columns)


def _sizes(tensor: Tensor) -> tuple[int, int]:
    return TILES.get(tensor.device.type, LARGE_TILES)


def _row_tiles(rows: Anchors | Keys) -> Iterator[slice]:
    """Slices of the rows. There is at least one slice, because a rank may have no rows."""
    size, count = _sizes(rows.ids)[0], len(rows.ids)
    return (slice(start, min(count, start + size)) for start in range(0, max(1, count), size))


def _key_tiles(block: Block) -> Iterator[slice]:
    size, count = _sizes(block.texts.ids)[1], len(block)
    return (slice(start, min(count, start + size)) for start in range(0, count, size))
