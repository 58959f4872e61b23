"""Near-duplicates over a whole source: MinHash (Broder, 1997) in bands, joined over files.

Three stages stand between map and reduce. *sign*: the keys of the bands of each row of a spill. *link*: rows that share
a key, a range of the keys at a time. *choose*: of rows that are linked, also through others, the one with the smallest
hash stays. The result does not depend on the order of rows, nor on the number of tasks.

A row is compared by one side, as a set of SHINGLE consecutive pieces. It is not a library's MinHash because the bytes
of a corpus must not depend on a library's version.

Legend: n rows, B bands, R hash functions of a band, e links.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.filters.settings import NearDuplicates
from data_prep.table import WRONG, Table, read_footer, read_frames
from infoxlm_ds.data.packs import runs

SHINGLE = 5  # pieces
CHUNK = 4096  # rows
Record = np.dtype([("band", np.uint64), ("row", np.uint64, 2)])  # a band's key, and the row's hash


class SignTask(NamedTuple):
    """`parts`: ranges into which the keys of bands are cut. `reference`: the language of the side that is compared; a
    row without it is compared by its first side."""

    spill: Path
    settings: NearDuplicates
    reference: str
    parts: int


class LinkTask(NamedTuple):
    """Part number `part` of the keys of a source. `signed`: what `sign` wrote for each spill that holds the source."""

    source: str
    part: int
    signed: tuple[Path, ...]


class ChooseTask(NamedTuple):
    """`links`: what `link` wrote for all parts of a source."""

    links: tuple[Path, ...]


def sign(task: SignTask, out: Path) -> None:
    """Write the records of a spill into a folder, a file for each source and part that has some."""
    footer = read_footer(task.spill)
    out.mkdir()
    for name, frames in footer.frames.items():
        languages = footer.languages[name]
        reference = languages.index(task.reference) if task.reference in languages else None
        for table in read_frames(task.spill, footer.of(name, range(max(frames) + 1))):
            records = _records(table, reference, task.settings)
            part = (records["band"] >> np.uint64(32)) * np.uint64(task.parts) >> np.uint64(32)
            for number in np.unique(part).tolist():
                with (out / f"{name}-{number}").open("ab") as file:
                    records[part == number].tofile(file)


def link(task: LinkTask, out: Path) -> None:
    """Write links [e, 2, 2]: the hash of a row, and that of the smallest row with the same key of a band."""
    records = np.concatenate([np.zeros(0, Record), *_of_part(task)])
    records = records[np.lexsort((records["row"][:, 1], records["row"][:, 0], records["band"]))]
    first = np.ones(len(records), bool)
    first[1:] = records["band"][1:] != records["band"][:-1]
    smallest = records["row"][np.maximum.accumulate(np.where(first, np.arange(len(records)), 0))]
    links = np.stack([records["row"], smallest], axis=1)[(records["row"] != smallest).any(1)]
    _save(out, np.unique(links, axis=0))


def choose(task: ChooseTask, out: Path) -> None:
    """Write the sorted hashes [n, 2] of the rows that go."""
    links = np.concatenate([np.zeros((0, 2, 2), np.uint64), *map(np.load, task.links)])
    rows, ends = np.unique(links.reshape(-1, 2), axis=0, return_inverse=True)
    one, other = ends.reshape(-1, 2).T
    root = np.arange(len(rows))  # the smallest row that each is known to be linked with
    while True:
        before = root.copy()
        smallest = np.minimum(root[one], root[other])
        np.minimum.at(root, one, smallest)
        np.minimum.at(root, other, smallest)
        root = root[root]
        if (root == before).all():
            break
    _save(out, rows[root != np.arange(len(rows))])


def goes(table: Table, chosen: np.ndarray) -> np.ndarray:
    """Which rows of a table are among the chosen ones, bool [n]."""
    first, last = (np.searchsorted(chosen[:, 0], table.keys[:, 0], side) for side in ("left", "right"))
    found = np.zeros(len(table), bool)
    for turn in range(int((last - first).max(initial=0))):  # one, unless hashes are equal in their first half
        at = np.minimum(first + turn, last - 1)
        found |= (first + turn < last) & (chosen[at, 1] == table.keys[:, 1])
    return found


def band_keys(ids: np.ndarray, lengths: np.ndarray, settings: NearDuplicates) -> np.ndarray:
    """The keys [n, B] uint64 of texts of `lengths` [n] pieces, all above 0, which lie one behind the other in `ids`."""
    hashes, starts = _shingles(ids, lengths)
    count = settings.bands * settings.rows
    parameters = (_mix(np.arange(2 * count, dtype=np.uint64)) >> np.uint64(32)).reshape(-1, 2)
    keys = np.arange(settings.bands, dtype=np.uint64)[None].repeat(len(lengths), axis=0)
    for number, (a, b) in enumerate(parameters):
        permuted = (hashes * (a | np.uint64(1)) + b) & np.uint64(2**32 - 1)
        band = number // settings.rows
        keys[:, band] = _mix(keys[:, band] ^ np.minimum.reduceat(permuted, starts))
    return keys


def _records(table: Table, reference: int | None, settings: NearDuplicates) -> np.ndarray:
    """The records of a table's rows."""
    parts = [np.zeros(0, Record)]
    for start in range(0, len(table), CHUNK):
        part = table.select(np.arange(start, min(start + CHUNK, len(table))))
        row = np.repeat(np.arange(len(part)), part.sides)
        rank = np.where(part.languages == reference, 0, np.where(part.languages < WRONG, 1, 2))
        order = np.lexsort((np.arange(len(row)), rank, row))
        side = order[np.cumsum(part.sides, dtype=np.int64) - part.sides]
        lengths = part.lengths.astype(np.int64)
        ids = part.ids[runs((np.cumsum(lengths) - lengths)[side], lengths[side])]
        keys = band_keys(ids, lengths[side], settings)
        records = np.empty(keys.shape, Record)
        records["band"], records["row"] = keys, part.keys[:, None]
        parts.append(records.ravel())
    return np.concatenate(parts)


def _shingles(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """32-bit hashes of all runs of SHINGLE pieces, and where each text's begin. A shorter text is one run."""
    counts = np.maximum(lengths - SHINGLE + 1, 1)
    starts = np.cumsum(lengths) - lengths
    places, within = runs(starts, counts), np.repeat(lengths, counts)
    padded = np.concatenate([ids.astype(np.uint64) + np.uint64(1), np.zeros(SHINGLE, np.uint64)])
    hashes = np.zeros(len(places), np.uint64)
    for column in range(SHINGLE):
        hashes = _mix(hashes ^ np.where(column < within, padded[places + column], np.uint64(0)))
    return hashes >> np.uint64(32), np.cumsum(counts) - counts


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads each bit (the finaliser of splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _of_part(task: LinkTask) -> Iterator[np.ndarray]:
    for folder in task.signed:
        path = folder / f"{task.source}-{task.part}"
        if path.exists():
            yield np.fromfile(path, Record)


def _save(out: Path, array: np.ndarray) -> None:
    with out.open("wb") as file:  # numpy would add an ending to the name
        np.save(file, array)
