"""The order of a stream as a pure function of integers: which pack of which source is draw number t.

A pack is 512 tokenised rows. Nothing here holds a list of items. All randomness is keyed by (seed, stream, ...), so any
draw of any lane can be computed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SLOTS = 65536  # draws in one round of the table: a source's share is exact to 1 / SLOTS
FEISTEL_ROUNDS = 6


class Draw(NamedTuple):
    """Pack number `pack` of source number `source`, in pass number `epoch` over the source."""

    source: int
    epoch: int
    pack: int


def keyed_generator(*key: object) -> np.random.Generator:
    """A random generator that depends only on its key."""
    return np.random.Generator(np.random.Philox(key=_number(*key)))


@dataclass(frozen=True)
class SourceSize:
    """A source, as far as the order depends on it."""

    name: str
    items: int
    packs: int


class Stage(NamedTuple):
    """From draw number `first_draw` on, items of the sources are read in these relative shares. A source with the
    share 0 is not read."""

    first_draw: int
    shares: np.ndarray


class Plan:
    """The draws of one stream. A stage begins where the one before leaves off: the pass over each source goes on."""

    def __init__(self, sources: list[SourceSize], stages: Sequence[Stage], seed: int, stream: str) -> None:
        assert stages[0].first_draw == 0
        self._sources, self._key = sources, (seed, stream)
        self._rounds: list[_Rounds] = []
        before = np.zeros(len(sources), np.int64)
        for number, stage in enumerate(stages):
            key = (*self._key, "slots", *([number] if number else []))
            self._rounds.append(_Rounds(stage.first_draw, before, _slots(sources, stage.shares), key))
            if number + 1 < len(stages):
                before = self._rounds[-1].drawn(stages[number + 1].first_draw)

    def draw(self, t: int) -> Draw:
        """Draw number t = 0, 1, ... Every pack of a source comes once before any comes again."""
        source, nth = next(rounds for rounds in reversed(self._rounds) if rounds.first <= t).draw(t)
        size = self._sources[source]
        epoch, place = divmod(nth, size.packs)
        key = _number(*self._key, size.name, epoch)
        return Draw(source, epoch, permuted(place, size.packs, key))

    def passes(self, draws: int) -> float:
        """The most passes over a source that so many draws make in any stage."""
        return max(
            draws * count / SLOTS / source.packs
            for rounds in self._rounds
            for count, source in zip(rounds.counts.tolist(), self._sources, strict=True)
        )

    def window(self, lane: int, k: int, lanes: int, packs: int) -> list[Draw]:
        """The draws of window k of a lane. Windows of `packs` draws go to the lanes in turn."""
        first = (k * lanes + lane) * packs
        return [self.draw(t) for t in range(first, first + packs)]


class _Rounds:
    """The draws of a stage: a shuffled table that names the source of each slot, again and again. `before`: how many
    draws of each source the stages before have."""

    def __init__(self, first: int, before: np.ndarray, counts: np.ndarray, key: tuple[object, ...]) -> None:
        self.first, self.counts, self._before = first, counts, before
        self._table = np.repeat(np.arange(len(counts)), counts)
        keyed_generator(*key).shuffle(self._table)
        self._seen = np.empty(SLOTS, dtype=np.int64)  # how often the source of a slot occurs before it in the table
        for source, count in enumerate(counts):
            self._seen[self._table == source] = np.arange(count)

    def draw(self, t: int) -> tuple[int, int]:
        """The source of draw t, and the number of its draws before."""
        turn, slot = divmod(t - self.first, SLOTS)
        source = int(self._table[slot])
        return source, int(self._before[source]) + turn * int(self.counts[source]) + int(self._seen[slot])

    def drawn(self, t: int) -> np.ndarray:
        """How many of the draws before t each source has."""
        turns, slots = divmod(t - self.first, SLOTS)
        return self._before + turns * self.counts + np.bincount(self._table[:slots], minlength=len(self.counts))


def permuted(index: int, size: int, key: int) -> int:
    """The place of `index` after a keyed permutation of range(size). A Feistel network on the next even number of bits
    is applied until the result lies in the range."""
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right + (turn << half), key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    """splitmix64's finaliser, on value and key."""
    x = (value * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _number(*key: object) -> int:
    text = "\x1f".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _slots(sources: list[SourceSize], shares: np.ndarray) -> np.ndarray:
    """How many of the SLOTS each source gets: by largest remainder, at least one each, but none for the share 0. A draw
    is a pack, and packs of small sources are not full. So a share of items is divided by the items of a pack."""
    items, packs = (np.array([getattr(s, name) for s in sources], dtype=np.float64) for name in ("items", "packs"))
    shares, least = shares * packs / items, (shares > 0).astype(np.int64)
    exact = shares / shares.sum() * (SLOTS - least.sum())
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: SLOTS - least.sum() - counts.sum()]] += 1
    return counts + least
