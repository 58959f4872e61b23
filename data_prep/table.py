"""Tokenised rows on their way from map to reduce, in memory and in files.

Legend: n rows, m sides of all rows, T ids.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from infoxlm_ds.data.packs import runs

LEVEL = 3  # of zstandard
WRONG = 1 << 15  # added to the number of a side's language: the side is a negative of its row
END = 8  # bytes at the end of a spill: where its footer begins


@dataclass(frozen=True)
class Table:
    """Rows, side after side. `keys` uint64 [n, 2]: a 128-bit hash of each row's texts. `sides` uint16 [n]: how many it
    has, hard negatives included. `languages` uint16 [m]: numbers of the sides' languages, see WRONG. `lengths` uint16
    [m], `text_ids` uint64 [m]. `ids` uint32 [T]. A row's negatives follow its other sides."""

    keys: np.ndarray
    sides: np.ndarray
    languages: np.ndarray
    lengths: np.ndarray
    text_ids: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))

    def select(self, rows: np.ndarray) -> Table:
        """These rows, in this order."""
        sides = self.sides[rows]
        side = runs((np.cumsum(self.sides, dtype=np.int64) - self.sides)[rows], sides.astype(np.int64))
        lengths = self.lengths[side]
        first = (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)[side]
        ids = self.ids[runs(first, lengths.astype(np.int64))]
        return Table(self.keys[rows], sides, self.languages[side], lengths, self.text_ids[side], ids)

    def in_order(self) -> Table:
        """Sorted by key. Equal rows stay in their order."""
        return self.select(np.lexsort((self.keys[:, 1], self.keys[:, 0])))

    @staticmethod
    def concatenate(parts: Sequence[Table]) -> Table:
        """The rows of all parts, in their order."""
        return Table(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Table)))

    @staticmethod
    def empty() -> Table:
        """No rows."""
        small, wide = np.zeros(0, np.uint16), np.zeros(0, np.uint64)
        return Table(np.zeros((0, 2), np.uint64), small, small, small, wide, np.zeros(0, np.uint32))


class Frame(NamedTuple):
    """Where the rows of a bucket stand in a spill."""

    offset: int
    size: int
    rows: int
    bytes: int  # of its arrays


class Footer(NamedTuple):
    """`languages` and `frames` by source; frames by bucket, in the order of the rows. `notes`: what else a task
    reports."""

    languages: dict[str, list[str]]
    frames: dict[str, dict[int, list[Frame]]]
    notes: Any

    def of(self, source: str, buckets: range) -> list[Frame]:
        """The frames of some buckets, one bucket behind the other."""
        frames = self.frames.get(source, {})
        return [frame for bucket in sorted(frames.keys() & set(buckets)) for frame in frames[bucket]]


class SpillWriter:
    """Writes rows of some sources to a file, group by group. A bucket holds the rows whose keys lie in its part of the
    range; `buckets` is a power of two."""

    def __init__(self, path: Path, buckets: int) -> None:
        self._file, self._buckets = path.open("wb"), buckets
        self._compressor = zstandard.ZstdCompressor(LEVEL, write_checksum=True)
        self._frames: dict[str, dict[int, list[Frame]]] = {}

    def __enter__(self) -> SpillWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, source: str, table: Table) -> None:
        """Write rows of a source, sorted by key and divided into buckets."""
        ordered = table.in_order()
        ends = np.searchsorted(bucket_of(ordered.keys, self._buckets), np.arange(self._buckets + 1)).tolist()
        of_source = self._frames.setdefault(source, {})
        for bucket in range(self._buckets):
            rows = ends[bucket + 1] - ends[bucket]
            if rows:
                data = _to_bytes(ordered.select(np.arange(ends[bucket], ends[bucket + 1])))
                frame = self._compressor.compress(data)
                of_source.setdefault(bucket, []).append(Frame(self._file.tell(), len(frame), rows, len(data)))
                self._file.write(frame)

    def end(self, languages: dict[str, list[str]], notes: Any) -> None:
        """Write the footer. `languages`: those that the tables of each source number."""
        footer, end = Footer(languages, self._frames, notes), self._file.tell()
        self._file.write(self._compressor.compress(json.dumps(footer._asdict()).encode()))
        self._file.write(end.to_bytes(END, "little"))


def read_footer(path: Path) -> Footer:
    """The footer of a spill."""
    with path.open("rb") as file:
        stop = file.seek(-END, io.SEEK_END)
        start = int.from_bytes(file.read(END), "little")
        file.seek(start)
        tree = json.loads(zstandard.decompress(file.read(stop - start)))
    frames = {
        name: {int(bucket): [Frame(*frame) for frame in of_bucket] for bucket, of_bucket in of_name.items()}
        for name, of_name in tree["frames"].items()
    }
    return Footer(tree["languages"], frames, tree["notes"])


def read_frames(path: Path, frames: Sequence[Frame]) -> Iterator[Table]:
    """The rows of each of these frames of a spill."""
    with path.open("rb") as file:
        for frame in frames:
            yield _from_bytes(zstandard.decompress(_at(file, frame)))


def bucket_of(keys: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket [n] of each key [n, 2]."""
    bits = buckets.bit_length() - 1
    return (keys[:, 0] >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(keys), np.int64)


def _at(file: io.BufferedReader, frame: Frame) -> bytes:
    file.seek(frame.offset)
    return file.read(frame.size)


def _to_bytes(table: Table) -> bytes:
    out = io.BytesIO()
    for f in fields(Table):
        np.save(out, getattr(table, f.name))
    return out.getvalue()


def _from_bytes(data: bytes) -> Table:
    file = io.BytesIO(data)
    return Table(*(np.load(file) for _ in fields(Table)))
