"""Zip files of OPUS in Moses form: `NAME.xx-yy.xx` and `NAME.xx-yy.yy` are aligned files. They are read in the zip."""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.description import SourceDescription
from data_prep.rows import Block, Item
from data_prep.sources import files, lines, moses
from infoxlm_ds.config import UserError

MEMBER = re.compile(r"(?P<stem>.*\.(?P<one>[A-Za-z_]+)-(?P<two>[A-Za-z_]+))\.(?P<side>(?P=one)|(?P=two))", re.DOTALL)
# Beside damage: RuntimeError for an encrypted member, NotImplementedError for an unknown compression.
UNREADABLE = (RuntimeError, ValueError, *files.DAMAGED)


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    """One block for each zip file."""
    return files.one_block_each(source.path, base)


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    (part,) = block.parts
    with files.raw(part.file) as stored, contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(stored))
            pairs = _pairs(archive.namelist())
        except UNREADABLE as error:
            raise files.damage(part.file, error) from None
        if not pairs:
            raise UserError(f"{part.file}: has no NAME.xx-yy.xx and NAME.xx-yy.yy: is it a Moses zip of OPUS?")
        for languages in pairs:
            yield from _rows(archive, part.file, languages)


def _pairs(members: list[str]) -> list[dict[str, str]]:
    """The aligned members, {language: name}, by name."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(members):
        if match := MEMBER.fullmatch(name):
            found.setdefault(match["stem"], {})[match["side"]] = name
    return [languages for languages in found.values() if len(languages) == 2]


def _rows(archive: zipfile.ZipFile, file: str, languages: dict[str, str]) -> Iterator[Item]:
    names = [f"{file}/{member}" for member in languages.values()]
    with contextlib.ExitStack() as stack:
        try:
            opened: list[Any] = [stack.enter_context(archive.open(member)) for member in languages.values()]
        except UNREADABLE as error:
            raise files.damage(names[0], error) from None
        sides = [lines.split(member, name) for member, name in zip(opened, names, strict=True)]
        yield from moses.rows(dict(zip(languages, sides, strict=True)), names)
