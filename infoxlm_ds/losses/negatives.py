"""The tiles of the contrast: sums over a row's many negatives and over a key's many anchors. No more than one tile of
logits is in memory. Derivation: docs/contrast.md.

Text ids and positions of positives stay on the host. So the host knows which logits are no negatives before the device
begins, and no tile makes it wait.

Legend: b anchors, n keys of a block, m rows and t keys of a tile, D width, I text ids of an item. Anchors are already
multiplied by the scale s = 1 / temperature, so an inner product is a logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from infoxlm_ds import dist
from infoxlm_ds.losses.keys import Anchors, Block, Keys, TextIndex

# Rows and keys of a tile. On a CPU a tile (2 MiB of float32) fits the second-level cache; a GPU needs large tiles.
TILES = {"cpu": (512, 1024)}
LARGE_TILES = (4096, 8192)
HEADROOM = 40.0  # exp(40) times a billion keys is far below the largest float32
NEVER = 50.0  # softplus' threshold; torch's default, 20, makes an error of 2e-9


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
    gaps, shared = _gaps(anchors, blocks)
    parts = [_sum_rows(anchors.rows(rows), tile, blocks, gaps) for tile, rows in enumerate(_row_tiles(anchors))]
    sums = Sums(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
    sums.shared += shared
    return sums


def _sum_rows(anchors: Anchors, tile: int, blocks: list[Block], gaps: list[Gaps]) -> Sums:
    """The sums of one tile of rows, which is number `tile`."""
    sums = Sums.none(anchors)
    for block, gaps_of_block in zip(blocks, gaps, strict=True):
        parts = list(_key_tiles(block))
        for number, part in enumerate(parts, tile * len(parts)):
            keys = block.part(part, anchors.vectors.dtype)
            logits = torch.addmm(sums.shift[:, None], anchors.vectors, keys.t(), beta=-1)
            gaps_of_block.leave_out(logits, number)
            _add(sums, logits, keys, anchors)
        sums.keys += len(block) - (block.own is not None)
    return sums


class Gaps(NamedTuple):
    """The logits that belong to no negative, because the key is the row's own positive or shares a text with it.

    `places`: where they lie in their flattened tiles, tile after tile, on the device; tile i has those from `ends[i]`
    to `ends[i + 1]`.
    """

    places: Tensor
    ends: list[int]

    def leave_out(self, logits: Tensor, tile: int) -> None:
        """Set them to -inf in a tile."""
        first, last = self.ends[tile : tile + 2]
        if first < last:
            logits.view(-1).index_fill_(0, self.places[first:last], -torch.inf)


def _gaps(anchors: Anchors, blocks: list[Block]) -> tuple[list[Gaps], Tensor]:
    """The gaps of each block, and the number of keys that share a text with each anchor, [b]. One upload."""
    b, sizes = len(anchors.ids), _sizes(anchors.vectors)
    shared, found = torch.zeros(b, dtype=torch.int64), []
    for block in blocks:
        rows, keys = block.texts.sharing(anchors.ids, block.own)
        shared += rows.bincount(minlength=b)
        found.append(_places(*_with_own(rows, keys, b, block.own), (b, len(block)), sizes))
    counts, *places = _uploaded([shared, *(places for places, _ in found)], anchors.vectors)
    return [Gaps(of_block, ends) for of_block, (_, ends) in zip(places, found, strict=True)], counts


def _with_own(rows: Tensor, keys: Tensor, count: int, own: int | None) -> tuple[Tensor, Tensor]:
    if own is None:
        return rows, keys
    each = torch.arange(count)
    return torch.cat([rows, each]), torch.cat([keys, each + own])


def _places(rows: Tensor, columns: Tensor, shape: tuple[int, int], sizes: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """Places and ends, see `Gaps`, of cells of a matrix of this shape that is computed in tiles of these sizes. Tiles
    are counted as cells are, row by row."""
    (height, width), (tall, wide) = shape, sizes
    down, across = max(1, -(-height // tall)), max(1, -(-width // wide))
    tiles = rows // tall * across + columns // wide
    places = rows % tall * (width - columns // wide * wide).clamp(max=wide) + columns % wide
    tiles, order = tiles.sort(stable=True)
    return places[order], torch.searchsorted(tiles, torch.arange(down * across + 1)).tolist()


def _uploaded(parts: list[Tensor], like: Tensor) -> tuple[Tensor, ...]:
    return dist.to_device(torch.cat(parts), like.device).split([len(part) for part in parts])


def _add(sums: Sums, logits: Tensor, keys: Tensor, anchors: Anchors) -> None:
    """Add a tile of logits minus shift, [m, t], to the sums. Overwrites the tile."""
    top = logits.amax(1)
    sums.hardest = torch.maximum(sums.hardest, top + sums.shift)
    positive = anchors.positive - sums.shift
    if _worthwhile(top >= positive):
        # The result is a float tensor: on a CPU, a comparison that makes bools takes three times as long.
        sums.above += torch.ge(logits, positive[:, None], out=torch.empty_like(logits)).sum(1).long()
    if anchors.cut is not None and _worthwhile(top >= (cut := anchors.cut - sums.shift)):
        over = logits >= cut[:, None]
        sums.dropped += over.sum(1)
        top = logits.masked_fill_(over, -torch.inf).amax(1)
    far = (top > HEADROOM) | ((top < -HEADROOM) & (top > -torch.inf) & (sums.mass == 0))
    if _worthwhile(far):
        by = torch.where(far, top, 0.0)
        sums.move(by)
        logits.sub_(by[:, None])
    logits.exp_()
    sums.mass += logits.sum(1)
    sums.weighted.addmm_(logits, keys)


def _worthwhile(rows: Tensor) -> bool:
    """Whether any row needs what follows. To ask saves time on a CPU. Elsewhere the host would wait for the answer, so
    there it is always yes: what follows changes no other row."""
    return rows.device.type != "cpu" or bool(rows.any())


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
        """Sums over no further positive."""
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
        own = None if block.own is None else block.own + rows.start
        for columns, same in _further(block.texts, anchors.ids, own, anchors.vectors):
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
    positives; `cut`: see `Anchors`.
    """

    shift: Tensor
    log_mass: Tensor
    log_repels: Tensor
    per_positive: Tensor
    cut: Tensor | None = None


def push(
    keys: Keys,
    own: int | None,
    anchors: Tensor,
    texts: TextIndex,
    fate: Fate,
    margin: float | Tensor,
    attracts: bool,
) -> Tensor:
    """The derivative of the sum of the anchors' losses by the keys, [n, D]. The keys are negatives of the anchors
    [N, D] and, if `attracts`, further positives. `own`: the number of the first key's own anchor, which is left out;
    those of the others follow. `texts`: the index of the anchors' texts."""
    block, (tall, wide) = Block(Keys.indexed(anchors, texts)), _sizes(keys.vectors)
    vectors, sums = keys.vectors.to(anchors.dtype), []
    rows, columns = _with_own(*texts.sharing(keys.ids, own), len(keys.ids), own)
    places, ends = _places(columns, rows, (len(texts.ids), len(keys.ids)), (wide, tall))
    gaps, row_tiles = Gaps(dist.to_device(places, vectors.device), ends), list(_row_tiles(keys))
    total = fate.log_mass.clamp_min(torch.finfo(fate.log_mass.dtype).min)  # it is -inf for an anchor without negatives
    for across, of_keys in enumerate(row_tiles):
        pushed = torch.zeros_like(vectors[of_keys])
        for down, part in enumerate(_key_tiles(block)):
            # Computed in the same layout as the rows' sums, so that it rounds alike.
            logits = torch.addmm(fate.shift[part, None], anchors[part], vectors[of_keys].t(), beta=-1)
            gaps.leave_out(logits, down * len(row_tiles) + across)
            if fate.cut is not None:
                logits.masked_fill_(logits >= (fate.cut - fate.shift)[part, None], -torch.inf)
            logits.sub_(total[part, None]).clamp_max_(0.0)  # a term cannot exceed the sum, except by rounding
            pushed.addmm_(logits.add_(fate.log_repels[part, None]).exp_().t(), anchors[part])
        first = None if own is None else own + of_keys.start
        for columns, same in _further(texts, keys.ids[of_keys], first, vectors) if attracts else ():
            logits = torch.addmm(fate.shift[columns, None], anchors[columns], vectors[of_keys].t(), beta=-1)
            away = fate.log_mass[None, columns] - logits.t() + margin
            weight = (torch.sigmoid(away) * fate.per_positive[None, columns]).masked_fill_(~same, 0.0)
            pushed.addmm_(weight, anchors[columns], alpha=-1)
        sums.append(pushed)
    return torch.cat(sums)


def _further(texts: TextIndex, ids: Tensor, own: int | None, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The few keys that share a text with any of the rows `ids` [m, I], in parts: their numbers [c], and whether each
    row shares a text with them and they are not its own positive, [m, c]. One upload."""
    rows, keys = texts.sharing(ids, own)
    numbers, column = keys.unique(return_inverse=True)
    if not len(numbers):
        return
    columns, cells = _uploaded([numbers, rows * len(numbers) + column], like)
    same = torch.zeros(len(ids), len(numbers), dtype=torch.bool, device=like.device)
    same.view(-1).index_fill_(0, cells, True)
    wide = _sizes(like)[1]
    yield from zip(columns.split(wide), same.split(wide, dim=1), strict=True)


def _sizes(tensor: Tensor) -> tuple[int, int]:
    return TILES.get(tensor.device.type, LARGE_TILES)


def _row_tiles(rows: Anchors | Keys) -> Iterator[slice]:
    """Slices of the rows. There is at least one slice, because a rank may have no rows."""
    size, count = _sizes(rows.vectors)[0], len(rows.ids)
    return (slice(start, min(count, start + size)) for start in range(0, max(1, count), size))


def _key_tiles(block: Block) -> Iterator[slice]:
    size, count = _sizes(block.vectors)[1], len(block)
    return (slice(start, min(count, start + size)) for start in range(0, count, size))
