"""Tab-separated text: a column a language, an empty cell where a row lacks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources import lines
from infoxlm_ds.config import UserError


def read(path: Path, languages: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for number, line in lines(path):
        cells = line.split("\t")
        if len(cells) != len(languages):
            raise UserError(
                f"{path} line {number}: {len(cells)} columns, expected {len(languages)} ({', '.join(languages)})"
            )
        yield {language: cell for language, cell in zip(languages, cells, strict=True) if cell.strip()}
