"""Readers, one module for each format. A new format is a module with these two functions, a line here, and its name
and keys in data_prep/description.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data_prep.description import SourceDescription
from data_prep.rows import Block, Item
from data_prep.sources import gettext, jsonl, moses, opus, parquet, text, tmx, tsv


class Reader(Protocol):
    """Reading all blocks in their order yields what reading the files from start to end yields, for any `size`.

    UserError if a file cannot be opened, is damaged so that its rest is lost, or does not fit to its aligned files. A
    part of a file that cannot be used, such as a line, is yielded as a Fault, and reading goes on.
    """

    def blocks(self, source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
        """The blocks of a source, of about `size` bytes. Its paths are relative to `base`."""
        ...

    def read(self, source: SourceDescription, block: Block) -> Iterator[Item]:
        """What stands in one block."""
        ...


READERS: dict[str, Reader] = {
    "gettext": gettext,
    "jsonl": jsonl,
    "moses": moses,
    "opus": opus,
    "parquet": parquet,
    "text": text,
    "tmx": tmx,
    "tsv": tsv,
}
