"""Pairs of sentences for evaluation, from rows `{language: sentence}` as `parallel.py` reads them.

Language codes are kept as the file has them (`fr_FR`, `zh-Hans`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from infoxlm_ds.config import UserError


@dataclass(frozen=True)
class Pairs:
    """The rows of one file that have both the pivot and `language`: text[i] translates pivot_text[i].

    `script`: of most letters of `text` (LATIN, ...). `cross_script`: the pivot has another one. `rows`: the rows'
    numbers in the file."""

    language: str
    pivot_text: list[str]
    text: list[str]
    cross_script: bool
    script: str
    rows: list[int]

    def first(self, count: int) -> Pairs:
        """The first pairs, at most so many."""
        return replace(self, pivot_text=self.pivot_text[:count], text=self.text[:count], rows=self.rows[:count])


def pairs_with_pivot(
    rows: list[dict[str, str]], pivot: str, languages: Sequence[str], min_pairs: int, source: str
) -> list[Pairs]:
    """One `Pairs` for every language that shares at least `min_pairs` rows with `pivot`, sorted by code.

    `languages`: only these (see `matches`; empty: all). UserError if no row has the pivot or no language has enough
    pairs; it names `source`.
    """
    with_pivot = [(number, row) for number, row in enumerate(rows) if pivot in row]
    if not with_pivot:
        raise UserError(f"{source}: no row has the pivot language {pivot!r}: choose another (--pivot, or probe.pivot)")
    counts = Counter(code for _, row in with_pivot for code in row if code != pivot and _wanted(code, languages))
    enough = sorted(code for code, count in counts.items() if count >= min_pairs)
    if not enough:
        best = ", ".join(f"{code} {count}" for code, count in counts.most_common(3)) or "none"
        raise UserError(
            f"{source}: no requested language has {min_pairs} pairs with {pivot!r} (most: {best}): "
            "lower --min-pairs, or change --languages (in a recipe: probe.languages)"
        )
    return [_pairs(with_pivot, pivot, code) for code in enough]


def matches(code: str, wanted: str) -> bool:
    """Whether a language code is `wanted` or a variant of it: zh_CN and zh-Hans are variants of zh."""
    return code == wanted or re.split("[_-]", code)[0] == wanted


def letters_by_script(texts: Iterable[str]) -> Counter[str]:
    """The number of letters of each script. A script is the first word of a letter's Unicode name (LATIN, CJK, ...)."""
    characters = Counter("".join(texts))
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            scripts[_script(character)] += count
    return scripts


def main_script(texts: Iterable[str]) -> str:
    """The script of most letters; "" without any letter."""
    scripts = letters_by_script(texts)
    return max(scripts, key=scripts.__getitem__, default="")


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split()[0]


def _wanted(code: str, languages: Sequence[str]) -> bool:
    return not languages or any(matches(code, wanted) for wanted in languages)


def _pairs(rows: list[tuple[int, dict[str, str]]], pivot: str, language: str) -> Pairs:
    chosen = [(number, row[pivot], row[language]) for number, row in rows if language in row]
    numbers, pivot_text, text = (list(column) for column in zip(*chosen, strict=True))
    of_pivot, scripts = main_script(pivot_text), letters_by_script(text)
    cross = 2 * scripts[of_pivot] < scripts.total()
    return Pairs(language, pivot_text, text, cross, main_script(text), numbers)
