"""What the contrast compares: keys and anchors, the blocks in which anchors meet keys, and an index of text ids.

Text ids stay on the host: it finds the keys that share a text with an anchor before the device begins.

Legend: b anchors, n keys, m items, D width, I text ids of an item.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from infoxlm_ds import dist


class TextIndex:
    """Text ids [n, I] of keys, sorted on the host, to find the keys that share a text with given items."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._texts, order = ids.flatten().sort()
        self._key_of = order // max(1, ids.shape[1])

    def sharing(self, ids: Tensor, own: int | None) -> tuple[Tensor, Tensor]:
        """Row and key of each pair of an item of `ids` [m, I] and a key that share a text, sorted by row and key.
        `own`: the key of the first item; the keys of the others follow. An item and its own key are no such pair."""
        texts = ids.flatten()
        first = torch.searchsorted(self._texts, texts)
        count = torch.searchsorted(self._texts, texts, right=True) - first
        places = torch.arange(int(count.sum())) + torch.repeat_interleave(first - (count.cumsum(0) - count), count)
        rows = torch.repeat_interleave(torch.arange(len(texts)) // max(1, ids.shape[1]), count)
        pairs, n = rows * len(self.ids) + self._key_of[places], max(1, len(self.ids))
        pairs = pairs.unique()
        rows, keys = pairs // n, pairs % n
        if own is None:
            return rows, keys
        other = keys - rows != own
        return rows[other], keys[other]


@dataclass(frozen=True)
class Keys:
    """Keys [n, D] and the text ids of their items [n, I], int64, which stay on the host. `sharded`: each rank holds a
    part of them.

    `texts` is computed on first use and kept, so one object should serve as long as its keys do not change.
    """

    vectors: Tensor
    ids: Tensor
    sharded: bool = False

    @cached_property
    def texts(self) -> TextIndex:
        """The index of the text ids."""
        return TextIndex(self.ids)

    @staticmethod
    def indexed(vectors: Tensor, texts: TextIndex, sharded: bool = False) -> Keys:
        """Keys of items whose index exists already."""
        keys = Keys(vectors, texts.ids, sharded)
        keys.__dict__["texts"] = texts
        return keys


class Anchors(NamedTuple):
    """Rows of one side. `vectors` [b, D]: times the scale; `ids` [b, I]: text ids, on the host; `positive` [b]: logit
    of each row's own positive, without margin; `cut` [b]: negatives with this logit or a larger one are dropped, or
    None."""

    vectors: Tensor
    ids: Tensor
    positive: Tensor
    cut: Tensor | None

    def rows(self, part: slice) -> Anchors:
        """Some of the anchors."""
        cut = None if self.cut is None else self.cut[part]
        return Anchors(self.vectors[part], self.ids[part], self.positive[part], cut)

    def of_all_ranks(self, counts: list[int], group: dist.Group) -> Anchors:
        """The anchors of all ranks. `counts`: how many each rank has. Collective."""
        cut = None if self.cut is None else dist.gather_rows(self.cut, counts, group)
        vectors, ids, positive = (dist.gather_rows(x, counts, group) for x in (self.vectors, self.ids, self.positive))
        return Anchors(vectors, ids, positive, cut)


class Block:
    """Keys that anchors are compared with."""

    def __init__(self, keys: Keys, own: int | None = None, *, unit: bool = False, attracts: bool = True) -> None:
        """`own`: the number of the first anchor's positive, if the block holds them; those of the others follow.
        `unit`: divide the keys by their norms; `attracts`: keys that share a text may be further positives."""
        self.vectors, self.texts, self.sharded = keys.vectors, keys.texts, keys.sharded
        self.own, self._unit, self.attracts = own, unit, attracts

    def __len__(self) -> int:
        return len(self.vectors)

    def part(self, chosen: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Some of the keys, in the anchors' dtype."""
        vectors = self.vectors[chosen].to(dtype)
        return normalize(vectors, dim=1) if self._unit else vectors
