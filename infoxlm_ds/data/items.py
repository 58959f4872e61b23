"""Makes items of a pack's rows: which sides of a row are read, and with which hard negatives.

A pack is 512 tokenised rows. An item is a row's text, or a pair of its texts; an n-way row, which holds the same
sentence in several languages, gives one pair or more. All choices are keyed, and the same for every lane that reads the
pack.

Legend: n items, s sides (1 monolingual, 2 a pair), h hard negatives of an item, T ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.manifest import Source
from infoxlm_ds.data.order import keyed_generator
from infoxlm_ds.data.packs import Pack, runs


@dataclass(frozen=True)
class Rows:
    """n items whose ids lie in `pool` [T]: side j of item i begins at `starts[j, i]` and has `lengths[j, i]` ids.
    `starts`, `lengths` [s + h, n]: hard negatives follow the sides; where a row has too few, their length is 0.

    `text_ids`: hashes of the sides' texts, [1, n]; for pairs [s + 1 + h, n]: after the sides' comes one that all
    translations of the row share. `languages` [s, n]: indices into `Corpus.languages`. `where` [3, n]: source, source
    epoch and row, which identify an item.
    """

    pool: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    text_ids: np.ndarray
    languages: np.ndarray
    where: np.ndarray

    def __len__(self) -> int:
        return self.starts.shape[1]

    def select(self, items: slice | np.ndarray) -> Rows:
        """These items, in this order, with the same pool."""
        columns = (self.starts, self.lengths, self.text_ids, self.languages, self.where)
        return Rows(self.pool, *(column[:, items] for column in columns))

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """The items of all parts, in their order, with one pool. There is at least one part."""
        if len(parts) == 1:
            return parts[0]
        shifts = np.cumsum([0] + [len(p.pool) for p in parts])
        starts = np.concatenate([p.starts + shift for p, shift in zip(parts, shifts, strict=False)], axis=1)
        rest = [
            [p.lengths for p in parts],
            [p.text_ids for p in parts],
            [p.languages for p in parts],
            [p.where for p in parts],
        ]
        return Rows(
            np.concatenate([p.pool for p in parts]), starts, *(np.concatenate(column, axis=1) for column in rest)
        )


@dataclass(frozen=True)
class Grouping:
    """Which items stay together in the shuffle.

    `pairs_per_row`: the number of pairs drawn from each n-way row, which holds the same sentence in several languages.
    `neighbours`: rows 2 i and 2 i + 1 of a pack stay together, in the same two languages if both have two in common. An
    odd last row goes with the first row.
    """

    pairs_per_row: int = 1
    neighbours: bool = False

    def rows(self, n: int, sides: int) -> tuple[np.ndarray, int]:
        """The row of each item of a pack of n rows, and how many items make a group."""
        if self.neighbours:
            return np.arange(n + n % 2) % n, 2
        return np.repeat(np.arange(n), self.size(sides)), self.size(sides)

    def size(self, sides: int) -> int:
        """Items of a row with this number of sides."""
        return self.pairs_per_row if sides > 2 else 1


ALONE = Grouping()  # each row gives one item


class ItemMaker:
    """Makes the items of packs for one stream."""

    def __init__(
        self,
        corpus: Corpus,
        key: tuple[object, ...],
        *,
        grouping: Grouping,
        pivot: str | None,
        pivot_share: float,
        negatives: int,
    ) -> None:
        """`key`: of all random choices. `pivot`: the language that is one side of a pair in at least `pivot_share` of
        the draws. `negatives`: hard negatives of an item, at most."""
        self._corpus, self._key, self._grouping = corpus, key, grouping
        self._pivot, self._pivot_share, self._negatives = pivot, pivot_share, negatives

    def make(self, number: int, pack_number: int, epoch: int) -> tuple[Rows, np.ndarray]:
        """The items of a pack of source number `number`, in pass number `epoch` over the source, and the sizes of the
        groups that they form. DamagedPack if the pack is damaged."""
        source, pack = self._corpus.sources[number], self._corpus.pack(number, pack_number)
        key = (*self._key, source.name, epoch, pack_number)
        lengths = pack.lengths.astype(np.int64)
        flat = lengths.T.ravel()
        starts = (np.cumsum(flat) - flat).reshape(lengths.T.shape).T
        rows, group = self._grouping.rows(lengths.shape[1], len(lengths))
        pool, (starts, lengths, text_ids) = pack.ids, (table[:, rows] for table in (starts, lengths, pack.text_ids))
        n = len(rows)
        first = self._corpus.first_row(number, pack_number)
        where = np.stack([np.full(n, number), np.full(n, epoch), first + rows])
        if source.kind == "mono":
            sides, shared = np.zeros((1, n), np.int64), text_ids[:0]
        else:
            sides = self._pairs(source, lengths > 0, group, keyed_generator(*key))
            first_present = np.argmax(lengths > 0, axis=0)[None]
            shared = np.take_along_axis(text_ids, first_present, axis=0)
        starts, lengths, text_ids = (np.take_along_axis(table, sides, axis=0) for table in (starts, lengths, text_ids))
        text_ids = np.concatenate([text_ids, shared])
        if self._negatives:
            pool = np.concatenate([pool, pack.negatives.ids])
            drawn = self._draw_negatives(pack, rows, sides[1], key)
            starts, lengths, text_ids = (
                np.concatenate(both) for both in zip((starts, lengths, text_ids), drawn, strict=True)
            )
        codes = np.array([self._corpus.languages.index(language) for language in source.languages])
        return Rows(pool, starts, lengths, text_ids, codes[sides], where), np.full(n // group, group)

    def _draw_negatives(
        self, pack: Pack, rows: np.ndarray, wanted: np.ndarray, key: tuple[object, ...]
    ) -> tuple[np.ndarray, ...]:
        """Where the hard negatives of each item begin in `pool`, their lengths and text ids, [h, n] each. They are
        drawn from those of the item's row, in the language `wanted` [n] as long as there are some."""
        wrong, n = pack.negatives, len(rows)
        of_row = np.bincount(wrong.rows, minlength=pack.lengths.shape[1])
        has = of_row[rows]
        item, candidate = np.repeat(np.arange(n), has), runs((np.cumsum(of_row) - of_row)[rows], has)
        chance = keyed_generator(*key, "negatives").random(len(item))
        order = np.lexsort((chance, wrong.sides[candidate] != wanted[item], item))
        turn = np.arange(len(item)) - np.repeat(np.cumsum(has) - has, has)
        taken = np.flatnonzero(turn < self._negatives)
        place, chosen = (turn[taken], item[taken]), candidate[order[taken]]
        lengths = wrong.lengths.astype(np.int64)
        starts = len(pack.ids) + np.cumsum(lengths) - lengths
        tables = tuple(np.zeros((self._negatives, n), kind) for kind in (np.int64, np.int64, np.uint64))
        for table, values in zip(tables, (starts, lengths, wrong.text_ids), strict=True):
            table[place] = values[chosen]
        return tables

    def _pairs(self, source: Source, present: np.ndarray, group: int, generator: np.random.Generator) -> np.ndarray:
        """Two different sides of each row, [2, n], in random order. In the share asked for, one of them is the
        pivot. The items of a group share one draw: neighbours get the same two sides, the pairs of one row get
        the next two each."""
        neighbours = self._grouping.neighbours
        if neighbours:
            common = np.repeat(present[:, ::2] & present[:, 1::2], 2, axis=1)
            present = np.where(common.sum(0) >= 2, common, present)
        items = present.shape[1]
        chance = np.repeat(generator.random((len(present), items // group)), group, axis=1)
        order = np.argsort(-np.where(present, chance, -1.0), axis=0, kind="stable")
        at = 2 * (0 if neighbours else np.arange(items) % group)
        first, second = (order[(at + side) % present.sum(0), np.arange(items)] for side in (0, 1))
        couple = group if neighbours else 1
        wanted, swapped = (
            np.repeat(generator.random(items // couple) < share, couple) for share in (self._pivot_share, 0.5)
        )
        if self._pivot in source.languages:
            pivot = source.languages.index(self._pivot)
            wanted = wanted & present[pivot] & (first != pivot)
            second = np.where(wanted, pivot, second)
        return np.where(swapped, np.stack([second, first]), np.stack([first, second]))
