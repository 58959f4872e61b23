"""Reads a prepared corpus in the order of the plan: windows of shuffled items, lane by lane.

A lane is one micro-batch of a step. A pack is 512 tokenised rows, and a window is a few packs that one lane draws.

Each lane has windows of its own, so a rank reads only what its lanes take; but a lane that takes its windows faster
comes to a pass over a source before the others. In a small corpus, where that would be passes ahead, all lanes take
from the same windows, one lane after the other, and every rank reads all of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.items import ALONE, Grouping, ItemMaker, Rows
from infoxlm_ds.data.mixture import Mixture
from infoxlm_ds.data.order import Draw, Plan, SourceSize, keyed_generator
from infoxlm_ds.data.packs import runs
from infoxlm_ds.data.store import DamagedPack

ROUNDS = 4  # if all lanes together read a corpus in fewer windows each, they share windows


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
        grouping: Grouping = ALONE,
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
        self._maker = ItemMaker(
            corpus, self._key, grouping=grouping, pivot=pivot, pivot_share=pivot_share, negatives=negatives
        )
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
                yield self._maker.make(self._numbers[draw.source], draw.pack, draw.epoch)
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
