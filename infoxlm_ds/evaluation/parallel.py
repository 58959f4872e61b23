"""Finds and reads parallel text for evaluation, in the forms in which its users download it.

FILE.jsonl                      rows {"key": ..., "text": {language: sentence}}
FILE.tsv                        a column for each language; the first line holds their codes
PREFIX.de-en.de, PREFIX.de-en.en   aligned lines, as of OPUS (Moses) and Tatoeba (deu-eng): one of the two files, or a
                                folder of such pairs

All may be compressed as .xz.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import aligned, lines, read_nway
from infoxlm_ds.evaluation.languages import short_code
from infoxlm_ds.evaluation.text import Pairs, matches, pairs_with_pivot

Rows = list[dict[str, str]]
CODE = r"[A-Za-z]{2,3}(?:_\w+)?"
NAME = re.compile(rf"(?:(?P<prefix>.+)\.)?(?P<pair>(?P<first>{CODE})-(?P<second>{CODE}))\.(?P<side>{CODE})(?:\.xz)?")
COLUMN = re.compile(r"[A-Za-z]{2,3}([_-]\w+)*")
KEYS = ("key", "id")  # columns of a table that are not text


def read_pairs(paths: Sequence[Path], pivot: str, languages: Sequence[str], min_pairs: int) -> dict[str, list[Pairs]]:
    """The pairs of each source, by its name: the path, for pairs of files with their prefix instead of languages.
    UserError as in `pairs_with_pivot`, or if no source has one of the `languages`."""
    parts_of: dict[str, dict[str, Rows]] = {}
    for path in paths:
        for name, parts in _sources(path).items():
            parts_of.setdefault(name, {}).update(parts)  # paths may name several pairs of one prefix
    by_source = {
        name: pairs_with_pivot([*chain(*parts.values())], pivot, languages, min_pairs, name)
        for name, parts in parts_of.items()
    }
    codes = {pairs.language for of_source in by_source.values() for pairs in of_source}
    for wanted in languages:
        if not any(matches(code, wanted) for code in codes):
            raise UserError(f"--languages {wanted}: no file has {min_pairs} pairs of {wanted!r} with {pivot!r}")
    return by_source


def _sources(path: Path) -> dict[str, dict[str, Rows]]:
    """The rows of each source, by the pair of files that they are from."""
    if path.is_dir():
        return _pairs_of(path, sorted(path.iterdir()))
    if (name := NAME.fullmatch(path.name)) and name["side"] in (name["first"], name["second"]):
        return _pairs_of(path.parent, [path])
    return {str(path): {"": _table(path) if ".tsv" in path.suffixes else list(read_nway(path))}}


def _pairs_of(folder: Path, paths: Sequence[Path]) -> dict[str, dict[str, Rows]]:
    """The rows of pairs of files, by prefix and pair. `paths`: one or both files of each pair."""
    found: dict[str, dict[str, Rows]] = {}
    for path in paths:
        name = NAME.fullmatch(path.name)
        if name is None or name["side"] not in (name["first"], name["second"]):
            continue
        start = path.name.removesuffix(".xz").removesuffix(name["side"])
        parts = found.setdefault(str(folder / name["prefix"]) if name["prefix"] else str(folder), {})
        if start not in parts:
            parts[start] = list(_aligned(folder, start, name["first"], name["second"]))
    if not found:
        raise UserError(f"{folder}: no parallel text: expected pairs of files such as tatoeba.deu-eng.deu and .eng")
    return found


def _aligned(folder: Path, start: str, first: str, second: str) -> Iterator[dict[str, str]]:
    """Rows of two files that go line by line. A row with a blank side is left out."""
    one, other = (_of_side(folder, start + code) for code in (first, second))
    for left, right in aligned(one, other):
        if left.strip() and right.strip():
            yield {short_code(first): left.strip(), short_code(second): right.strip()}


def _of_side(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.xz"):
        if path.is_file():
            return path
    raise UserError(f"{folder / name}: no such file: a pair needs both sides")


def _table(path: Path) -> Rows:
    """The rows of a TSV file, without blank cells."""
    codes: list[str] = []
    rows = []
    for number, line in lines(path):
        cells = line.split("\t")
        if not codes:
            codes = [cell.strip() for cell in cells]
            if wrong := [code for code in codes if code not in KEYS and not COLUMN.fullmatch(code)]:
                raise UserError(f"{path} line 1: {wrong[0]!r} is no language code: name each column, such as en<TAB>de")
            if twice := [code for code, count in Counter(codes).items() if count > 1]:
                raise UserError(f"{path} line 1: {twice[0]!r} names two columns")
            continue
        if len(cells) != len(codes):
            raise UserError(f"{path} line {number}: {len(cells)} columns, expected {len(codes)} with tabs between them")
        sentences = zip(codes, cells, strict=True)
        rows.append({code: cell.strip() for code, cell in sentences if cell.strip() and code not in KEYS})
    return rows
