"""Reads a prepared corpus in the order of the plan: windows of shuffled items, lane by lane.

Legend: n items, s sides (1 monolingual, 2 a pair), T ids.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from infoxlm_ds.config import UserError
from infoxlm_ds.data.manifest import Source, load_manifest
from infoxlm_ds.data.packs import Pack, read_pack
from infoxlm_ds.data.plan import Draw, Plan, SourceSize, keyed_generator

KINDS = {"mmlm": ("mono",), "tlm": ("para", "nway"), "xlco": ("para", "nway")}  # what each stream reads
PACKS_KEPT = 64  # decoded, for windows of several lanes and streams that draw the same packs


@dataclass(frozen=True)
class Rows:
    """n items whose ids lie in `pool` [T]: side j of item i at `starts[j, i]`, `lengths[j, i]` long.

    `text_ids` [s + 1, n] (pairs) or [1, n]: hashes of the sides' texts, and for pairs one that all translations of the
    row share.
    `languages` [s, n]: indices into `Corpus.languages`. `where` [3, n]: source, source epoch and row, which name an
    item.
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
        """These items, in this order, on the same pool."""
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


class Corpus:
    """A corpus folder: manifest, indices, and packs on demand."""

    def __init__(self, path: Path) -> None:
        """UserError where it is no corpus, a file is missing or has another size than the manifest says, or an index
        is damaged. Shards are not hashed here: each pack is checked when it is read."""
        self.path, self.manifest = path, load_manifest(path)
        for file in self.manifest.files():
            found = path / file.name
            if not found.is_file():
                raise UserError(f"{found} is missing: restore the file or prepare the corpus again")
            if found.stat().st_size != file.bytes:
                raise UserError(
                    f"{found} has {found.stat().st_size} bytes, not {file.bytes}: "
                    "restore the file or prepare the corpus again"
                )
        self.sources = self.manifest.sources
        self.languages = sorted({language for source in self.sources for language in source.languages})
        self._indices = [self._index(source) for source in self.sources]
        self._first_rows = [np.cumsum(index[:, 3]) - index[:, 3] for index in self._indices]
        self.pack = lru_cache(PACKS_KEPT)(self._read)

    def _read(self, source: int, number: int) -> Pack:
        shard, offset, size, _, _, crc32 = (int(x) for x in self._indices[source][number])
        return read_pack(self.path / self.sources[source].shards[shard].name, offset, size, crc32)

    def first_row(self, source: int, number: int) -> int:
        """The row number, in its source, of a pack's first row."""
        return int(self._first_rows[source][number])

    def _index(self, source: Source) -> np.ndarray:
        path = self.path / source.index.name
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != source.index.sha256:
            raise UserError(f"{path} is damaged: restore the file or prepare the corpus again")
        return np.load(io.BytesIO(data))


class StreamReader:
    """One stream of items for some of the lanes. The state is two integers a lane: window and offset."""

    def __init__(
        self,
        corpus: Corpus,
        stream: str,
        *,
        seed: int,
        alpha: float,
        lanes: int,
        window_packs: int,
        own_lanes: Sequence[int],
        pivot: str | None = None,
        pivot_share: float = 0.0,
    ) -> None:
        self._corpus, self._key, self._lanes, self._packs = corpus, (seed, stream), lanes, window_packs
        self._numbers = [i for i, source in enumerate(corpus.sources) if source.kind in KINDS[stream] and source.items]
        sources = [corpus.sources[i] for i in self._numbers]
        if not sources:
            raise UserError(
                f"{corpus.path} has no source for {stream}, which reads {' or '.join(KINDS[stream])} sources"
            )
        # Monolingual text has no pairs to choose from: there the pivot only has to be a language of the corpus.
        choice = corpus.languages if stream == "mmlm" else {language for s in sources for language in s.languages}
        if pivot is not None and pivot not in choice:
            raise UserError(
                f"sampling.pivot: no source that {stream} reads in {corpus.path} has the language {pivot!r}"
            )
        self.items, self.tokens = sum(s.items for s in sources), sum(s.tokens for s in sources)
        self._plan = Plan([SourceSize(s.name, s.items, s.packs) for s in sources], alpha, seed, stream)
        self._pivot, self._pivot_share = pivot, pivot_share
        self._at = dict.fromkeys(own_lanes, (0, 0))
        self._windows: dict[int, tuple[int, Rows]] = {}

    def take(self, lane: int, *, items: int | None = None, tokens: int | None = None, overhead: int = 0) -> Rows:
        """The lane's next `items`, or as many as fit into `tokens` at their length plus `overhead` each (at least
        one)."""
        assert (items is None) != (tokens is None)
        parts: list[Rows] = []
        left = items if items is not None else tokens
        assert left is not None
        while left > 0:
            k, offset = self._at[lane]
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
        return dict(self._at)

    def restore(self, state: dict[int, tuple[int, int]]) -> None:
        assert state.keys() == self._at.keys()
        self._at = dict(state)

    def _window(self, lane: int, k: int) -> Rows:
        if lane not in self._windows or self._windows[lane][0] != k:
            draws = self._plan.window(lane, k, self._lanes, self._packs)
            rows = Rows.concatenate([self._rows(draw) for draw in draws])
            order = keyed_generator(*self._key, "window", k * self._lanes + lane).permutation(len(rows))
            self._windows[lane] = (k, rows.select(order))
        return self._windows[lane][1]

    def _rows(self, draw: Draw) -> Rows:
        number = self._numbers[draw.source]
        source, pack = self._corpus.sources[number], self._corpus.pack(number, draw.pack)
        lengths = pack.lengths.astype(np.int64)
        flat = lengths.T.ravel()
        starts = (np.cumsum(flat) - flat).reshape(lengths.T.shape).T
        n = lengths.shape[1]
        first = self._corpus.first_row(number, draw.pack)
        where = np.stack([np.full(n, number), np.full(n, draw.epoch), first + np.arange(n)])
        if source.kind == "mono":
            sides, shared = np.zeros((1, n), np.int64), pack.text_ids[:0]
        else:
            generator = keyed_generator(*self._key, source.name, draw.epoch, draw.pack)
            sides = self._pairs(source, lengths, generator)
            first_present = np.argmax(lengths > 0, axis=0)[None]
            shared = np.take_along_axis(pack.text_ids, first_present, axis=0)
        picked = [np.take_along_axis(table, sides, axis=0) for table in (starts, lengths, pack.text_ids)]
        codes = np.array([self._corpus.languages.index(language) for language in source.languages])
        return Rows(pack.ids, picked[0], picked[1], np.concatenate([picked[2], shared]), codes[sides], where)

    def _pairs(self, source: Source, lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Two different sides that each row has, [2, n], in random order; the pivot is one of them in the share asked
        for."""
        chance = np.where(lengths > 0, generator.random(lengths.shape), -1.0)
        first, second = np.argsort(-chance, axis=0, kind="stable")[:2]
        wanted, swapped = (
            generator.random(lengths.shape[1]) < self._pivot_share,
            generator.random(lengths.shape[1]) < 0.5,
        )
        if self._pivot in source.languages:
            pivot = source.languages.index(self._pivot)
            wanted &= (lengths[pivot] > 0) & (first != pivot)
            second = np.where(wanted, pivot, second)
        return np.where(swapped, np.stack([second, first]), np.stack([first, second]))
