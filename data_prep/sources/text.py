"""Monolingual text: one sentence on each line. `documents` says where a document ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.description import SourceDescription
from data_prep.rows import Block, Document, Fault, Item, Notice, Part
from data_prep.sources import files, lines

LONGEST = 2**24  # characters; a longer document is given out in several, so that it need not fit into memory


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    if source.documents != "file":
        return lines.blocks(source, base, size, None if source.documents == "line" else _is_blank)
    return files.one_block_each(source.path, base)


def _is_blank(line: bytes) -> bool:
    return not line.strip()


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    ((part,), (language,)) = block.parts, source.languages
    if source.documents != "line":
        yield from _documents(part, language, blank_ends=source.documents != "file")
        return
    for number, line in enumerate(lines.lines(part), part.line + 1):
        if isinstance(line, Fault):
            yield line
        elif line.strip():
            yield Document(f"{part.file} line {number}", language, [line])


def _documents(part: Part, language: str, blank_ends: bool) -> Iterator[Item]:
    """A blank line ends a document, if `blank_ends`. A line that cannot be used is left out of its document."""
    sentences: list[str] = []
    first, size, seen_blank = 0, 0, False
    for number, line in enumerate(lines.lines(part), part.line + 1):
        if isinstance(line, Fault):
            yield line
            continue
        blank = not line.strip()
        seen_blank |= blank
        if not blank:
            first = first if sentences else number
            sentences.append(line)
            size += len(line)
        if sentences and ((blank and blank_ends) or size > LONGEST):
            yield Document(f"{part.file} line {first}", language, sentences)
            sentences, size = [], 0
    if sentences:
        yield Document(f"{part.file} line {first}", language, sentences)
    # Blocks end behind a blank line: in a block at the start of a file, none means that the file has none.
    if blank_ends and part.start == 0 and not seen_blank and (first > 1 or len(sentences) > 1):
        what = "no blank line, so the whole file is one document: set documents to line or file, as you mean it"
        yield Notice(part.file, what)
