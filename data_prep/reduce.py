"""Reduce: joins a range of the hashes of all spills of a source, drops duplicates, and writes a shard of packs.

The shards of a source follow each other in the order of hashes, so their rows are shuffled. The last pack of each shard
may be short.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.filters.report import SAMPLES
from data_prep.near_duplicates import goes
from data_prep.table import WRONG, Footer, Table, read_footer, read_frames
from infoxlm_ds.atomic import sync
from infoxlm_ds.data.files import sha256_of
from infoxlm_ds.data.packs import ROWS, Negatives, Pack, write_shard

SHARD = 64 * 2**20  # bytes of the arrays of a shard, about


class ReduceTask(NamedTuple):
    """A shard. `spills`: all that hold the source; `buckets`: the first and the one after the last. `left_out`: hashes
    of rows that go, if near-duplicates were looked for."""

    shard: Path
    source: str
    languages: tuple[str, ...]
    spills: tuple[Path, ...]
    buckets: tuple[int, int]
    left_out: Path | None = None


class Reduced(NamedTuple):
    """What was written. `samples`: hash, language and ids of a text of some near-duplicates. `packs`: the rows of the
    index, see `write_shard`."""

    items: int
    duplicates: int
    near_duplicates: int
    samples: list[tuple[str, str, list[int]]]
    bytes: int
    sha256: str
    packs: list[list[int]]


class Target(NamedTuple):
    """A source of the corpus: the languages of its rows, and the bytes of each bucket."""

    languages: tuple[str, ...]
    sizes: np.ndarray


def targets_of(footers: Sequence[Footer], buckets: int) -> dict[str, Target]:
    """The sources that spills hold, by name."""
    languages: dict[str, set[str]] = {}
    sizes: dict[str, np.ndarray] = {}
    for footer in footers:
        for name, frames in footer.frames.items():
            languages.setdefault(name, set()).update(footer.languages[name])
            sums = sizes.setdefault(name, np.zeros(buckets, np.int64))
            for bucket, of_bucket in frames.items():
                sums[bucket] += sum(frame.bytes for frame in of_bucket)
    return {name: Target(tuple(sorted(languages[name])), sizes[name]) for name in sorted(sizes)}


def shards_of(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of buckets of about SHARD bytes."""
    start, size = 0, 0
    for bucket, more in enumerate(sizes.tolist()):
        if size and size + more > SHARD:
            yield start, bucket
            start, size = bucket, 0
        size += more
    if size:
        yield start, len(sizes)


def reduce_shard(task: ReduceTask, out: Path) -> None:
    """Write the shard, then `Reduced` to `out`."""
    table = Table.concatenate([Table.empty(), *_parts(task)]).in_order()
    different = np.ones(len(table), bool)
    different[1:] = (table.keys[1:] != table.keys[:-1]).any(1)
    near = goes(table, np.load(task.left_out)) & different if task.left_out else np.zeros(len(table), bool)
    (rows,) = np.nonzero(different & ~near)
    partial = task.shard.with_name(f"{task.shard.name}.partial")
    index = write_shard(partial, packs_of(table.select(rows), len(task.languages)), task.shard.stem)
    sync(partial)
    written = Reduced(
        items=len(rows),
        duplicates=len(table) - int(different.sum()),
        near_duplicates=int(near.sum()),
        samples=_samples(table.select(np.flatnonzero(near)[:SAMPLES]), task.languages),
        bytes=partial.stat().st_size,
        sha256=sha256_of(partial),
        packs=index.tolist(),
    )
    partial.replace(task.shard)
    out.write_text(json.dumps(written._asdict()), encoding="utf-8")


def read_reduced(path: Path) -> Reduced:
    """What `reduce_shard` wrote."""
    return Reduced(**json.loads(path.read_text(encoding="utf-8")))


def _samples(table: Table, languages: tuple[str, ...]) -> list[tuple[str, str, list[int]]]:
    """The first side of each row."""
    first = np.cumsum(table.sides, dtype=np.int64) - table.sides
    ids = np.split(table.ids, np.cumsum(table.lengths, dtype=np.int64)[:-1])
    return [
        (f"{key:016x}", languages[int(table.languages[side])], ids[side].tolist())
        for key, side in zip(table.keys[:, 0].tolist(), first.tolist(), strict=True)
    ]


def packs_of(table: Table, languages: int) -> Iterator[Pack]:
    """The packs of a table's rows, in their order. `languages`: how many the source has."""
    for start in range(0, len(table), ROWS):
        part = table.select(np.arange(start, min(start + ROWS, len(table))))
        row = np.repeat(np.arange(len(part)), part.sides)
        wrong = part.languages >= WRONG
        side, of_wrong = (part.languages[~wrong], row[~wrong]), np.repeat(wrong, part.lengths)
        lengths, text_ids = (np.zeros((languages, len(part)), kind) for kind in (np.uint16, np.uint64))
        lengths[side], text_ids[side] = part.lengths[~wrong], part.text_ids[~wrong]
        negatives = Negatives(
            rows=row[wrong],
            sides=part.languages[wrong] - WRONG,
            lengths=part.lengths[wrong],
            text_ids=part.text_ids[wrong],
            ids=part.ids[of_wrong],
        )
        yield Pack(part.ids[~of_wrong], lengths, text_ids, negatives)


def _parts(task: ReduceTask) -> Iterator[Table]:
    numbers = {language: number for number, language in enumerate(task.languages)}
    for spill in task.spills:
        footer = read_footer(spill)
        for table in read_frames(spill, footer.of(task.source, range(*task.buckets))):
            new = np.array([numbers[language] for language in footer.languages[task.source]], np.uint16)
            yield replace(table, languages=new[table.languages % WRONG] + table.languages // WRONG * WRONG)
