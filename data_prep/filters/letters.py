"""Filters on the letters of a text: how many there are, and of which scripts."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from data_prep.filters.languages import BLOCKS, letters, ranges, scripts
from data_prep.filters.markup import strip_markup, strip_placeholders

_LETTERS_AND_SPACE = (string.ascii_letters + " ").encode()


def too_few_letters(text: str, share: float) -> bool:
    """Whether less than this share of the characters are letters. Combining marks, which write vowels in many scripts,
    count as letters; spaces do not count."""
    if text.replace(" ", "")[: int(share * len(text)) + 1].isalpha():
        return False  # most texts end here: it saves time
    ascii_part = text.encode("ascii", "ignore")
    others = len(ascii_part.translate(None, _LETTERS_AND_SPACE))
    if len(ascii_part) != len(text):
        others += sum(map(len, _not_letters().findall(text)))
    return others > (1 - share) * (len(text) - text.count(" "))


def is_of_another_script(text: str, language: str, most: float, most_latin: float, above: int) -> bool:
    """Whether more than the share `most` of the letters are of scripts that the language does not use. Names and brands
    are Latin in every language: only if a text has more than `above` Latin letters, their share is compared with
    `most_latin`; placeholders and tags do not count. False for an unknown language."""
    known = _patterns(language)
    if known is None or (known.uses_latin and text.isascii()):
        return False
    foreign = _letters_of(known.foreign, text)
    if foreign and foreign > most * (foreign + _letters_of(known.own, text)):
        return True
    if known.uses_latin or len(text.encode("ascii", "ignore")) <= above:
        return False
    text = strip_markup(strip_placeholders(text))
    latin = _letters_of(known.latin, text)
    return latin > above and latin > most_latin * (latin + foreign + _letters_of(known.own, text))


class _Patterns(NamedTuple):
    """Letters of the scripts of a language, of Latin, and of all other scripts."""

    own: re.Pattern[str]
    latin: re.Pattern[str]
    foreign: re.Pattern[str]
    uses_latin: bool


@functools.cache
def _patterns(language: str) -> _Patterns | None:
    known = scripts(language)
    if not known:
        return None
    return _Patterns(_any_of(known), _any_of({"Latn"}), _any_of(BLOCKS.keys() - known - {"Latn"}), "Latn" in known)


def _any_of(names: AbstractSet[str]) -> re.Pattern[str]:
    return re.compile(f"[{''.join(letters(name) for name in sorted(names))}]+")


def _letters_of(pattern: re.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))


@functools.cache
def _not_letters() -> re.Pattern[str]:
    """Numbers, punctuation, symbols and emoji beyond ASCII."""
    found = ranges(code for code in range(0x80, 0x10000) if unicodedata.category(chr(code))[0] in "NPS")
    return re.compile(f"[{found}\U0001f000-\U0001faff]+")  # each range beyond U+FFFF costs time
