"""Aligned files, one for each language: line i of each file is the same sentence (Moses, OPUS)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import lines


def read(paths: dict[str, Path]) -> Iterator[dict[str, str]]:
    for row in zip_longest(*(lines(path) for path in paths.values())):
        if None in row:
            shortest = [str(path) for path, cell in zip(paths.values(), row, strict=True) if cell is None]
            raise UserError(
                f"{', '.join(shortest)}: fewer lines than the other side: aligned files need the same number of lines"
            )
        yield {language: text for language, (_, text) in zip(paths, row, strict=True) if text.strip()}
