"""Tab-separated text: one column for each language; a cell is empty if the row lacks that language."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import lines


def read(path: Path, languages: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for number, line in lines(path):
        cells = line.split("\t")
        if len(cells) != len(languages):
            raise UserError(
                f"{path} line {number}: {len(cells)} columns, expected {len(languages)} ({', '.join(languages)})"
            )
        yield {language: cell for language, cell in zip(languages, cells, strict=True) if cell.strip()}
