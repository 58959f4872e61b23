"""The order of a stream as a pure function of integers: which pack of which source is draw number t.

A pack is 512 tokenised rows. Nothing here holds a list of items. All randomness is keyed by (seed, stream, ...), so any
draw of any lane can be computed at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SLOTS = 65536  # draws in one round of the table: a source's share is exact to 1 / SLOTS
ROUNDS = 6


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
    name: str
    items: int
    packs: int


class Plan:
    """The draws of one stream. Each source is taken in proportion to p^alpha, p being its share of the
    items (XLM-R, section 3.1)."""

    def __init__(self, sources: list[SourceSize], alpha: float, seed: int, stream: str) -> None:
        self._sources, self._key = sources, (seed, stream)
        self._counts = _slots(sources, alpha)
        table = np.repeat(np.arange(len(sources)), self._counts)
        keyed_generator(*self._key, "slots").shuffle(table)
        self._table = table
        self._seen = np.empty(SLOTS, dtype=np.int64)  # how often the source of a slot occurs before it in the table
        for source, count in enumerate(self._counts):
            self._seen[table == source] = np.arange(count)

    def draw(self, t: int) -> Draw:
        """Draw number t = 0, 1, ... Every pack of a source comes once before any comes again."""
        turn, slot = divmod(t, SLOTS)
        source = int(self._table[slot])
        nth = turn * int(self._counts[source]) + int(self._seen[slot])
        size = self._sources[source]
        epoch, place = divmod(nth, size.packs)
        key = _number(*self._key, size.name, epoch)
        return Draw(source, epoch, permuted(place, size.packs, key))

    def passes(self, draws: int) -> float:
        """The most passes over a source that so many draws make."""
        return max(
            draws * count / SLOTS / source.packs
            for count, source in zip(self._counts.tolist(), self._sources, strict=True)
        )

    def window(self, lane: int, k: int, lanes: int, packs: int) -> list[Draw]:
        """The draws of window k of a lane. Windows of `packs` draws go to the lanes in turn."""
        first = (k * lanes + lane) * packs
        return [self.draw(t) for t in range(first, first + packs)]


def permuted(index: int, size: int, key: int) -> int:
    """The place of `index` after a keyed permutation of range(size). A Feistel network on the next even number of bits
    is applied until the result lies in the range."""
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
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


def _slots(sources: list[SourceSize], alpha: float) -> np.ndarray:
    """How many of the SLOTS each source gets: by largest remainder, at least one each. A draw is a pack, and packs of
    small sources are not full. So a share of items is divided by the items of a pack."""
    items, packs = (np.array([getattr(s, name) for s in sources], dtype=np.float64) for name in ("items", "packs"))
    shares = items**alpha * packs / items
    exact = shares / shares.sum() * (SLOTS - len(sources))
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: SLOTS - len(sources) - counts.sum()]] += 1
    return counts + 1
