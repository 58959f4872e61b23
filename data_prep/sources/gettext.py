"""Catalogs of gettext, .po and .mo: a row holds a msgid and its translations in all files of a block.

`path` is a pattern with {language} in it, such as `po/{language}.po` or `{language}/LC_MESSAGES/*.mo`; files whose
paths differ only in the language are read together. Or `paths` names a file for each language. `languages` is the
language of the msgids. Entries that are fuzzy, obsolete or not translated are left out.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath

import polib

from data_prep.description import SourceDescription
from data_prep.rows import Block, Fault, Item, Part, Row
from data_prep.sources import files, lines
from infoxlm_ds.config import UserError

LONGEST = 2**28  # bytes of a catalog: it is read whole
MO = (b"\xde\x12\x04\x95", b"\x95\x04\x12\xde")  # the first bytes of a .mo
TOKEN = re.compile(r"\*\*/|\*|\?|\{language\}|.", re.DOTALL)


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    """One block for each set of files that differ only in the language."""
    if source.path is None:
        sides = [files.find(path, base) for path in source.paths.values()]
        for path, found in zip(source.paths.values(), sides, strict=True):
            if len(found) != 1:
                raise UserError(f"source {source.name}: {path} is {len(found)} files: use path with {{language}} in it")
        yield Block(tuple(files.whole(found[0]) for found in sides))
        return
    together: dict[tuple[str, ...], list[Part]] = {}
    pattern = _pattern(source.path)
    for file in files.find(source.path.replace("{language}", "*"), base):
        if match := pattern.fullmatch(file):
            same = list(match.groups())
            del same[pattern.groupindex["language"] - 1]
            together.setdefault(tuple(same), []).append(files.whole(file))
    if not together:
        raise UserError(f"{source.path}: no such file: correct the path in the corpus description")
    for parts in together.values():
        yield Block(tuple(parts))


def _pattern(path: str) -> re.Pattern[str]:
    """What the files of a path look like, whatever stands before it. All that may vary is in groups."""
    wild = {"**/": "((?:.*/)?)", "*": "([^/]*)", "?": "([^/])", "{language}": "(?P<language>[^/]+)"}
    parts = []
    for token in TOKEN.findall(path if "://" in path else str(PurePath(path))):
        parts.append(wild.get(token) or re.escape(token))
        if token == "{language}":
            wild[token] = "(?P=language)"  # further on, the same language
    return re.compile("((?:.*/)?)" + "".join(parts), re.DOTALL)


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    if source.path is None:
        languages = list(source.paths)
    else:
        pattern = _pattern(source.path)
        languages = [match["language"] for part in block.parts if (match := pattern.fullmatch(part.file))]
    (original,) = source.languages
    rows: dict[tuple[str | None, str], Row] = {}
    for language, part in zip(languages, block.parts, strict=True):
        for place, entry in _entries(part):
            text = entry.msgstr or entry.msgstr_plural.get(0, "")
            if not entry.msgid.strip() or not text.strip():
                continue
            problem = lines.bad_text(entry.msgid + text)
            if problem:
                yield Fault(place, f"the entry {problem}")
                continue
            row = rows.setdefault((entry.msgctxt, entry.msgid), Row(place, {original: entry.msgid}))
            # Some projects write a key as msgid, and the text of its language into a file of that language.
            if language == original or language not in row.texts:
                row.texts[language] = text
    yield from rows.values()


def _entries(part: Part) -> Iterator[tuple[str, polib.POEntry | polib.MOEntry]]:
    with files.plain(part) as file:
        try:
            data = file.read(LONGEST + 1)
            if len(data) > LONGEST:
                raise ValueError(f"longer than {LONGEST:,} bytes")
            catalog = _parse(data)
        except Exception as error:  # polib tells damage by exceptions of many kinds
            raise files.damage(part.file, error) from None
    for number, entry in enumerate(catalog, 1):
        if isinstance(entry, polib.MOEntry):
            yield f"{part.file} entry {number}", entry
        elif not (entry.fuzzy or entry.obsolete):
            yield f"{part.file} line {entry.linenum}", entry


def _parse(data: bytes) -> polib.POFile | polib.MOFile:
    if data[:4] in MO:
        return polib.mofile(data)
    # From a file, because polib splits a text at U+2028 too, and takes a text that is a path for the file there.
    with tempfile.NamedTemporaryFile(suffix=".po") as copy:
        copy.write(data.removeprefix(lines.MARK))
        copy.flush()
        try:
            return polib.pofile(copy.name)
        except OSError as error:
            raise ValueError(str(error).replace(f" {copy.name}", "")) from None
