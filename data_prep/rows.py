"""What readers of sources yield, and the blocks that they read.

A block is the work of one task: a range of bytes of a file, or of each of several aligned files. How a source is cut
into blocks depends on its files alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Bytes `start` to `end` of a file, a path or URL; `line` lines stand before it. A compressed file is one part. Of
    a Parquet file, `start` and `end` are numbers of row groups, and `line` of rows."""

    file: str
    start: int
    end: int
    line: int = 0


class Block(NamedTuple):
    """One part of each aligned file; of the others, one part."""

    parts: tuple[Part, ...]


class Row(NamedTuple):
    """One row of a parallel source: the same sentence in several languages, without blank ones.

    `place`: where it stands, as a person would look for it (`file line 7`). `negatives`: wrong sentences
    for this row, by language.
    """

    place: str
    texts: dict[str, str]
    negatives: dict[str, list[str]] = {}  # noqa: RUF012 - nobody changes it


class Document(NamedTuple):
    """Consecutive sentences of one language."""

    place: str
    language: str
    sentences: list[str]


class Fault(NamedTuple):
    """A part of a file that cannot be used: where it stands, and what is wrong."""

    place: str
    what: str


class Notice(NamedTuple):
    """What the user should know about a file that can be used."""

    place: str
    what: str


Item = Row | Document | Fault | Notice
