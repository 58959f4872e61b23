"""Monolingual text: one sentence on each line, an empty line between documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from infoxlm_ds.data.text import lines


def read(path: Path) -> Iterator[list[str]]:
    document: list[str] = []
    for _, line in lines(path):
        if line.strip():
            document.append(line)
        elif document:
            yield document
            document = []
    if document:
        yield document
