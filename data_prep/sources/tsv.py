"""Tab-separated text: one column for each language; a cell is empty if the row lacks that language."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.description import SourceDescription
from data_prep.rows import Block, Fault, Item, Row
from data_prep.sources import lines


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    return lines.blocks(source, base, size)


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    ((part,), languages) = block.parts, source.languages
    for number, line in enumerate(lines.lines(part), part.line + 1):
        if isinstance(line, Fault):
            yield line
            continue
        place, cells = f"{part.file} line {number}", line.split("\t")
        if len(cells) == len(languages):
            yield Row(place, {code: cell for code, cell in zip(languages, cells, strict=True) if cell.strip()})
        else:
            yield Fault(place, f"{len(cells)} columns, expected {len(languages)} ({', '.join(languages)})")
