"""Parallel evaluation text: JSON lines `{"key": ..., "text": {language: sentence}}`, plain or xz-compressed.

Language codes are kept as the file has them (`fr_FR`, `zh-Hans`).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from infoxlm_ds.config import UserError


@dataclass(frozen=True)
class Pairs:
    """The rows of one file that have both the pivot and `language`: text[i] translates pivot_text[i]."""

    language: str
    pivot_text: list[str]
    text: list[str]
    cross_script: bool  # the two languages are written in different scripts, judged by most of their letters

    def first(self, count: int) -> "Pairs":
        """The first pairs, at most so many."""
        return replace(self, pivot_text=self.pivot_text[:count], text=self.text[:count])


def pairs_with_pivot(
    rows: list[dict[str, str]], pivot: str, languages: Sequence[str], min_pairs: int, source: str
) -> list[Pairs]:
    """One `Pairs` for every language that shares at least `min_pairs` rows with `pivot`, sorted by code.

    `languages`: only these (see `matches`; empty: all). UserError if no row has the pivot or no language has enough
    pairs; it names `source`.
    """
    with_pivot = [row for row in rows if pivot in row]
    if not with_pivot:
        raise UserError(f"{source}: no row has the pivot language {pivot!r}: choose another (--pivot, or probe.pivot)")
    counts = Counter(code for row in with_pivot for code in row if code != pivot and _wanted(code, languages))
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


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split()[0]


def _wanted(code: str, languages: Sequence[str]) -> bool:
    return not languages or any(matches(code, wanted) for wanted in languages)


def _pairs(rows: list[dict[str, str]], pivot: str, language: str) -> Pairs:
    both = [(row[pivot], row[language]) for row in rows if language in row]
    pivot_text = [pivot_sentence for pivot_sentence, _ in both]
    text = [sentence for _, sentence in both]
    pivot_scripts, scripts = letters_by_script(pivot_text), letters_by_script(text)
    shared = scripts[max(pivot_scripts, key=pivot_scripts.__getitem__, default="")]
    return Pairs(language, pivot_text, text, cross_script=2 * shared < scripts.total())
