"""Reads a prepared corpus in the order of the plan: windows of shuffled items, lane by lane.

A lane is one micro-batch of a step. A pack is 512 tokenised rows, and a window is a few packs that one lane draws.

Each lane has windows of its own, so a rank reads only what its lanes take; but a lane that takes its windows faster
comes to a pass over a source before the others. In a small corpus, where that would be passes ahead, all lanes take
from the same windows, one lane after the other, and every rank reads all of these.

Legend: n items, s sides (1 monolingual, 2 a pair), h hard negatives of an item, T ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.manifest import Source
from infoxlm_ds.data.mixture import Mixture
from infoxlm_ds.data.order import Draw, Plan, SourceSize, keyed_generator
from infoxlm_ds.data.packs import Pack, runs
from infoxlm_ds.data.store import DamagedPack

ROUNDS = 4  # if all lanes together read a corpus in fewer windows each, they share windows


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


class LeftOut(NamedTuple):
    """A draw of a stream whose pack is damaged: the stream goes on without its items. `pack`: which one, for people."""

    stream: str
    draw: int
    pack: str


class DamagedDraw(UserError):
    """A lane cannot take its items, because the pack of a draw is damaged."""

    def __init__(self, what: LeftOut, problem: str) -> None:
        super().__init__(problem)
        self.what = what


class Amount(NamedTuple):
    """What a lane takes: so many items, or as many as fit into `tokens`, each counting its length plus `overhead`."""

    items: int | None = None
    tokens: int | None = None
    overhead: int = 0


class StreamReader:
    """One stream of items, for some of the lanes. The state of each lane is two integers: window and offset.

    In each step every lane takes once, in the order of lanes, and all take as much. `shared`: they take from the same
    windows, which hold at most one pass over a source (or one pack). Then a pass begins only in a window that holds the
    end of the last one, or after it.
    """

    def __init__(
        self,
        corpus: Corpus,
        stream: str,
        *,
        seed: int,
        mixture: Mixture,
        lanes: int,
        window_packs: int,
        own_lanes: Sequence[int],
        pivot: str | None = None,
        pivot_share: float = 0.0,
        grouping: Grouping = Grouping(),
        negatives: int = 0,
    ) -> None:
        self._corpus, self._key, self._lanes = corpus, (seed, stream), lanes
        self._numbers = mixture.numbers
        sources = [corpus.sources[i] for i in self._numbers]
        # Monolingual text has no pairs to choose from, so its pivot may be any language of the corpus.
        choice = corpus.languages if stream == "mmlm" else {language for s in sources for language in s.languages}
        if pivot is not None and pivot not in choice:
            raise UserError(
                f"sampling.pivot: no source that {stream} reads in {corpus.path} has the language {pivot!r}"
            )
        self.items = sum(s.items * grouping.size(len(s.languages)) for s in sources)  # of an epoch
        self.tokens = sum(s.tokens for s in sources)
        self._plan = Plan([SourceSize(s.name, s.items, s.packs) for s in sources], mixture.stages, seed, stream)
        self._pivot, self._pivot_share, self._grouping, self._negatives = pivot, pivot_share, grouping, negatives
        self.shared = lanes > 1 and sum(s.packs for s in sources) < ROUNDS * lanes * window_packs
        self._orders = 1 if self.shared else lanes  # of windows
        most = int(1 / self._plan.passes(1))  # packs of a window
        self._packs = max(1, min(window_packs, most)) if self.shared else window_packs
        self._own, self._turn, self._last = tuple(own_lanes), 0, Amount()
        self._at = dict.fromkeys([0] if self.shared else own_lanes, (0, 0))
        self._windows: dict[int, tuple[int, Rows]] = {}
        self._next: dict[int, object] = {}  # what a server sends for the windows after these
        self._left_out: set[int] = set()  # draws

    def take(self, lane: int, *, items: int | None = None, tokens: int | None = None, overhead: int = 0) -> Rows:
        """The lane's next `items`, or as many as fit into `tokens` (at least one). Each counts its length plus
        `overhead`. DamagedDraw if one of their packs is damaged; then only `restore` may be called."""
        amount = Amount(items, tokens, overhead)
        if not self.shared:
            return self._take(lane, amount)
        self._last = amount
        self._pass_over(lane)
        self._turn = (lane + 1) % self._lanes
        return self._take(0, amount)

    def _pass_over(self, lane: int) -> None:
        """Take for the lanes whose turn comes before this one's: other ranks have them."""
        while self._turn != lane:
            self._take(0, self._last)
            self._turn = (self._turn + 1) % self._lanes

    def _take(self, lane: int, amount: Amount) -> Rows:
        items, tokens, overhead = amount
        assert (items is None) != (tokens is None)
        parts: list[Rows] = []
        left = items if items is not None else tokens
        assert left is not None
        while left > 0:
            k, offset = self._at[lane]
            if self._left_out and not self._draws(lane, k):
                self._at[lane] = (k + 1, 0)
                continue
            window = self._window(lane, k)
            rest = len(window) - offset
            if items is not None:
                n = min(left, rest)
                left -= n
            else:
                ends = np.cumsum(window.lengths[:, offset:].sum(0) + overhead)
                n = int(np.searchsorted(ends, left, side="right"))
                if n == 0 and not parts:
                    n = 1
                left = 0 if n < rest else left - int(ends[-1])
            if n:
                parts.append(window.select(slice(offset, offset + n)))
            self._at[lane] = (k, offset + n) if n < rest else (k + 1, 0)
        return Rows.concatenate(parts)

    def state(self) -> dict[int, tuple[int, int]]:
        """The positions of the own lanes after the step."""
        if not self.shared:
            return dict(self._at)
        self._pass_over(0)
        return dict.fromkeys(self._own, self._at[0])

    def restore(self, state: dict[int, tuple[int, int]], left_out: Iterable[LeftOut] = ()) -> None:
        """Go on at the positions of the own lanes, without the draws of this stream that were left out before."""
        assert state.keys() == set(self._own)
        self._at, self._turn = ({0: next(iter(state.values()))} if self.shared else dict(state)), 0
        self._left_out = {what.draw for what in left_out if what.stream == self._key[1]}
        self._windows.clear()

    def leave_out(self, draw: int) -> None:
        """Leave out a draw from now on. If a lane has begun its window, whose order changes, the lane leaves out the
        rest of it. Call it between steps."""
        k, lane = divmod(draw // self._packs, self._orders)
        self._left_out.add(draw)
        self._windows.pop(lane, None)
        if self._at.get(lane, (k, 0)) > (k, 0):
            self._at[lane] = max(self._at[lane], (k + 1, 0))

    def _window(self, lane: int, k: int) -> Rows:
        if lane not in self._windows or self._windows[lane][0] != k:
            coming = self._corpus.ahead(self._packs_of(lane, k))
            self._next[lane] = self._corpus.ahead(self._packs_of(lane, k + 1))
            parts, groups = zip(*self._read(lane, k), strict=True)
            del coming
            sizes = np.concatenate(groups)
            order = keyed_generator(*self._key, "window", k * self._orders + lane).permutation(len(sizes))
            items = runs((np.cumsum(sizes) - sizes)[order], sizes[order])
            self._windows[lane] = (k, Rows.concatenate(parts).select(items))
        return self._windows[lane][1]

    def _read(self, lane: int, k: int) -> Iterator[tuple[Rows, np.ndarray]]:
        """The items of a window, pack by pack, and the sizes of the groups that they form."""
        for t, draw in self._draws(lane, k):
            try:
                yield self._rows(draw)
            except DamagedPack as error:
                name = f"{self._corpus.sources[self._numbers[draw.source]].name} {draw.pack}"
                raise DamagedDraw(LeftOut(self._key[1], t, name), str(error)) from None

    def _draws(self, lane: int, k: int) -> list[tuple[int, Draw]]:
        """The draws of a window with their numbers, but for those that are left out."""
        first = (k * self._orders + lane) * self._packs
        numbered = enumerate(self._plan.window(lane, k, self._orders, self._packs), first)
        return [(t, draw) for t, draw in numbered if t not in self._left_out]

    def _packs_of(self, lane: int, k: int) -> Iterator[tuple[int, int]]:
        """Source and number of a window's packs."""
        for _, draw in self._draws(lane, k):
            yield self._numbers[draw.source], draw.pack

    def _rows(self, draw: Draw) -> tuple[Rows, np.ndarray]:
        """The items of a pack, and the sizes of the groups that they form."""
        number = self._numbers[draw.source]
        source, pack = self._corpus.sources[number], self._corpus.pack(number, draw.pack)
        lengths = pack.lengths.astype(np.int64)
        flat = lengths.T.ravel()
        starts = (np.cumsum(flat) - flat).reshape(lengths.T.shape).T
        rows, group = self._grouping.rows(lengths.shape[1], len(lengths))
        pool, (starts, lengths, text_ids) = pack.ids, (table[:, rows] for table in (starts, lengths, pack.text_ids))
        n = len(rows)
        first = self._corpus.first_row(number, draw.pack)
        where = np.stack([np.full(n, number), np.full(n, draw.epoch), first + rows])
        if source.kind == "mono":
            sides, shared = np.zeros((1, n), np.int64), text_ids[:0]
        else:
            generator = keyed_generator(*self._key, source.name, draw.epoch, draw.pack)
            sides = self._pairs(source, lengths > 0, group, generator)
            first_present = np.argmax(lengths > 0, axis=0)[None]
            shared = np.take_along_axis(text_ids, first_present, axis=0)
        starts, lengths, text_ids = (np.take_along_axis(table, sides, axis=0) for table in (starts, lengths, text_ids))
        text_ids = np.concatenate([text_ids, shared])
        if self._negatives:
            pool = np.concatenate([pool, pack.negatives.ids])
            drawn = self._draw_negatives(pack, rows, sides[1], (*self._key, source.name, draw.epoch, draw.pack))
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
