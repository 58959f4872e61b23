"""Text files of users: lines, and n-way rows, which hold the same sentence in several languages."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from infoxlm_ds.config import UserError

HALF = re.compile("[\ud800-\udfff]")  # JSON may hold it, UTF-8 and tokenizers may not


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, plain or .xz. UserError names the file and the line that cannot be read."""
    number = 0
    try:
        # Read bytes. Text mode decodes ahead, so an error would name a wrong line. Text mode also ends lines at a lone
        # carriage return, so aligned files would no longer match.
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            for line in file:
                text = line.decode("utf-8")
                if number == 0:
                    text = text.removeprefix("\ufeff")  # a mark of the byte order, as Windows writes it
                number += 1
                yield number, text.rstrip("\r\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UserError(f"{path} line {number + 1}: cannot be read: {error}") from None


def aligned(one: Path, other: Path) -> Iterator[tuple[str, str]]:
    """The lines of two files that go line by line. UserError if one is shorter, or as in `lines`."""
    for left, right in zip_longest(lines(one), lines(other)):
        if left is None or right is None:
            shorter, number = (one, right[0]) if left is None else (other, left[0])
            raise UserError(f"{shorter} ends before line {number} of its other side: the two files are not aligned")
        yield left[1], right[1]


def read_nway(path: Path) -> Iterator[dict[str, str]]:
    """The {language: sentence} of each line `{"key": ..., "text": {language: sentence}}`, without blank sentences.
    UserError names the file and the line."""
    for number, line in lines(path):
        where = f"{path} line {number}"
        try:
            texts = dict(json.loads(line)["text"].items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{where}: expected {{"key": ..., "text": {{language: sentence}}}}') from None
        for language, sentence in texts.items():
            if not isinstance(sentence, str):
                raise UserError(f"{where}: the sentence of {language!r} is not a string")
            if HALF.search(sentence):
                raise UserError(f"{where}: the sentence of {language!r} has half of a surrogate pair: it is no text")
        yield {language: sentence for language, sentence in texts.items() if sentence.strip()}
