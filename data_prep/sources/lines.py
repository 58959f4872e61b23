"""Splits files into lines, and lines into blocks. A line ends at a line feed, or a carriage return and a line feed, and
nowhere else: so aligned files match."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from data_prep.description import SourceDescription
from data_prep.rows import Block, Fault, Part
from data_prep.sources import files

LONGEST = 10_000_000  # bytes of a line
CHUNK = 2**20  # bytes
MARK = b"\xef\xbb\xbf"  # of the byte order, as Windows writes it at the start of a file


def lines(part: Part) -> Iterator[str | Fault]:
    """The lines of a part, without their ends; a Fault in place of one that cannot be used. UserError if the file is
    damaged so that its rest is lost."""
    with files.plain(part) as file:
        yield from split(file, part.file, part.line)


def split(file: io.BufferedIOBase, name: str, before: int = 0) -> Iterator[str | Fault]:
    """The lines of an open file; `before` lines stand before it."""
    number = before
    pieces = _whole_lines(file)
    while True:
        try:
            piece = next(pieces, None)
        except files.DAMAGED as error:
            raise files.damage(f"{name} after line {number}", error) from None
        if piece is None:
            return
        if number == 0:
            piece = piece.removeprefix(MARK)
        # Usually all lines are good: then they are decoded together, which is several times as fast.
        found: list[str] | list[str | Fault] = _good(piece) or _checked(piece, name, number)
        yield from found
        number += len(found)


def _whole_lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Pieces of a file that end at the end of a line. Of a line that is too long, only the start is kept."""
    kept = b""
    # read1, not read: it gives what stands before damage to a compressed file.
    while chunk := file.read1(CHUNK):
        head, end, tail = chunk.rpartition(b"\n")
        if end:
            yield kept + head + end
            kept = tail
        else:
            kept = (kept + chunk)[: LONGEST + 1]
    if kept:
        yield kept


def _good(piece: bytes) -> list[str] | None:
    """The lines of a piece, or None if one of them is wrong."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    if "\0" in text or len(piece) > LONGEST:
        return None
    found = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in found] if "\r" in text else found


def _checked(piece: bytes, name: str, before: int) -> list[str | Fault]:
    split_up = piece.removesuffix(b"\n").split(b"\n")
    return [_line(line, f"{name} line {number}") for number, line in enumerate(split_up, before + 1)]


def _line(line: bytes, place: str) -> str | Fault:
    if len(line) > LONGEST:
        return Fault(place, f"longer than {LONGEST:,} bytes")
    if b"\0" in line:
        return Fault(place, f"byte {line.index(0) + 1} of the line is NUL")
    try:
        return line.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        return Fault(place, f"byte {error.start + 1} of the line, {line[error.start]:#04x}, is not UTF-8")


def bad_text(text: object) -> str:
    """What is wrong with a sentence that did not come from a line: from JSON, for instance. "" if nothing is."""
    if not isinstance(text, str):
        return "is not a string"
    if "\0" in text:
        return "has a NUL character"
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "has half a surrogate pair"
    return ""


def blocks(
    source: SourceDescription, base: Path, size: int, last: Callable[[bytes], bool] | None = None
) -> Iterator[Block]:
    """The blocks of files of lines. A block ends behind a line for which `last` is true; without it, behind any."""
    assert source.path is not None
    for file in files.find(source.path, base):
        if files.is_compressed(file):
            yield Block((files.whole(file),))
            continue
        with files.raw(file) as opened:
            start, before = 0, 0
            for end, line in _ends(opened, size, last):
                yield Block((Part(file, start, end, before),))
                start, before = end, line


def _ends(file: IO[bytes], size: int, last: Callable[[bytes], bool] | None) -> Iterator[tuple[int, int]]:
    """Where blocks end: the byte, and the number of lines before it."""
    end, line = 0, 0
    while True:
        taken, count = skip_bytes(file, size)
        if not taken:
            return
        at_start = True  # whether `piece` starts a line
        while last is not None and (piece := file.readline(CHUNK)):
            ended = piece.endswith(b"\n")
            taken, count = taken + len(piece), count + ended
            if at_start and ended and last(piece):
                break
            at_start = ended
        end, line = end + taken, line + count
        yield end, line


def skip_bytes(file: IO[bytes], size: int) -> tuple[int, int]:
    """Go on by `size` bytes and to the end of the line. Returns the number of bytes and of lines."""
    taken, count, ended = 0, 0, True
    while taken < size and (chunk := file.read(min(CHUNK, size - taken))):
        taken, count, ended = taken + len(chunk), count + chunk.count(b"\n"), chunk.endswith(b"\n")
    while not ended and (piece := file.readline(CHUNK)):
        ended = piece.endswith(b"\n")
        taken, count = taken + len(piece), count + ended
    return taken, count + (not ended)


def skip_lines(file: IO[bytes], wanted: int) -> tuple[int, int]:
    """Go on by `wanted` lines, or to the end of the file. Returns the number of bytes and of lines."""
    taken, count, ended = 0, 0, True
    while count < wanted and (chunk := file.read(CHUNK)):
        rest = len(chunk.split(b"\n", wanted - count)[-1]) if chunk.count(b"\n") >= wanted - count else 0
        file.seek(-rest, os.SEEK_CUR)
        chunk = chunk[: len(chunk) - rest]
        taken, count, ended = taken + len(chunk), count + chunk.count(b"\n"), chunk.endswith(b"\n")
    return taken, count + (not ended)
