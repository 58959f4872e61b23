"""Aligned files, one for each language: line i of each file is the same sentence (Moses)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from data_prep.description import SourceDescription
from data_prep.rows import Block, Fault, Item, Part, Row
from data_prep.sources import files, lines
from infoxlm_ds.config import UserError


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    sides = [files.find(path, base) for path in source.paths.values()]
    if len({len(side) for side in sides}) > 1:
        counts = ", ".join(f"{path}: {len(side)}" for path, side in zip(source.paths.values(), sides, strict=True))
        raise UserError(f"source {source.name}: not as many files of each language ({counts})")
    for aligned in zip(*sides, strict=True):
        if any(map(files.is_compressed, aligned)):
            yield Block(tuple(map(files.whole, aligned)))
        else:
            yield from _cut(aligned, max(1, size // len(aligned)))


def _cut(aligned: Sequence[str], size: int) -> Iterator[Block]:
    """Blocks of the same lines of each file, with about `size` bytes of the first."""
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(files.raw(file)) for file in aligned]
        starts, line = [0] * len(aligned), 0
        while True:
            taken, count = lines.skip_bytes(first, size)
            moved = [(taken, count), *(lines.skip_lines(file, count) for file in others)]
            if not taken or any(other != count for _, other in moved):
                rest = [lines.skip_bytes(file, sys.maxsize)[1] for file in (first, *others)]
                check_lengths(aligned, [line + n + more for (_, n), more in zip(moved, rest, strict=True)])
                return
            ends = [start + n for start, (n, _) in zip(starts, moved, strict=True)]
            yield Block(tuple(Part(*part, line) for part in zip(aligned, starts, ends, strict=True)))
            starts, line = ends, line + count


def check_lengths(names: Sequence[str], counts: Sequence[int]) -> None:
    """UserError if aligned files have different numbers of lines."""
    if len(set(counts)) > 1:
        listed = ", ".join(f"{name}: {count:,}" for name, count in zip(names, counts, strict=True))
        raise UserError(f"aligned files need the same number of lines, but these differ: {listed}")


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    sides = dict(zip(source.paths, map(lines.lines, block.parts), strict=True))
    yield from rows(sides, [part.file for part in block.parts], block.parts[0].line)


def rows(sides: dict[str, Iterator[str | Fault]], names: Sequence[str], before: int = 0) -> Iterator[Item]:
    """The rows of aligned lines, by language; `before` lines stand before them. UserError if their numbers differ."""
    for number, cells in enumerate(zip_longest(*sides.values()), before + 1):
        if None in cells:
            rest = (sum(1 for _ in side) for side in sides.values())
            check_lengths(names, [number - (cell is None) + n for cell, n in zip(cells, rest, strict=True)])
        texts, fault = {}, None
        for language, cell in zip(sides, cells, strict=True):
            if isinstance(cell, Fault):
                fault = fault or cell
            elif cell.strip():
                texts[language] = cell
        yield fault or Row(f"{names[0]} line {number}", texts)
