"""Tokenised rows on their way from map to reduce, in memory and in files.

Legend: n rows, m sides of all rows, T ids.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
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
        return Table(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Table)))

    @staticmethod
    def empty() -> Table:
        small, wide = np.zeros(0, np.uint16), np.zeros(0, np.uint64)
        return Table(np.zeros((0, 2), np.uint64), small, small, small, wide, np.zeros(0, np.uint32))


class Frame(NamedTuple):
    """Where the rows of a bucket stand in a spill."""

    offset: int
    size: int
    rows: int
    bytes: int  # of its arrays


class Footer(NamedTuple):
    """`languages` and `frames` by source; frames by bucket. `notes`: what else a task reports."""

    languages: dict[str, list[str]]
    frames: dict[str, dict[int, Frame]]
    notes: Any


def write_spill(path: Path, tables: Mapping[str, tuple[list[str], Table]], buckets: int, notes: Any) -> None:
    """Write the rows of some sources, with the languages that their tables number. A bucket holds the rows whose keys
    lie in its part of the range; `buckets` is a power of two."""
    compressor = zstandard.ZstdCompressor(LEVEL, write_checksum=True)
    footer = Footer({}, {}, notes)
    with path.open("wb") as file:
        for name, (languages, table) in sorted(tables.items()):
            ordered = table.in_order()
            ends = np.searchsorted(bucket_of(ordered.keys, buckets), np.arange(buckets + 1)).tolist()
            footer.languages[name], footer.frames[name] = languages, {}
            for bucket in range(buckets):
                rows = ends[bucket + 1] - ends[bucket]
                if rows:
                    data = _to_bytes(ordered.select(np.arange(ends[bucket], ends[bucket + 1])))
                    frame = compressor.compress(data)
                    footer.frames[name][bucket] = Frame(file.tell(), len(frame), rows, len(data))
                    file.write(frame)
        end = file.tell()
        file.write(compressor.compress(json.dumps(footer._asdict()).encode()))
        file.write(end.to_bytes(END, "little"))


def read_footer(path: Path) -> Footer:
    with path.open("rb") as file:
        stop = file.seek(-END, io.SEEK_END)
        start = int.from_bytes(file.read(END), "little")
        file.seek(start)
        tree = json.loads(zstandard.decompress(file.read(stop - start)))
    frames = {name: {int(b): Frame(*f) for b, f in of_name.items()} for name, of_name in tree["frames"].items()}
    return Footer(tree["languages"], frames, tree["notes"])


def read_frames(path: Path, frames: Sequence[Frame]) -> list[Table]:
    with path.open("rb") as file:
        return [_from_bytes(zstandard.decompress(_at(file, frame))) for frame in frames]


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
