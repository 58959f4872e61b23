"""Filters of pairs whose sides have different numbers or addresses."""

from __future__ import annotations

import re
import unicodedata

_DIGIT = re.compile(r"\d")
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"'()\[\]{}（）「」、。，]+", re.IGNORECASE)


def numbers_differ(one: str, other: str) -> bool:
    """Whether the digits of one text are not those of the other, in any order. Digits of all scripts are equal;
    `1,000` equals `1.000`."""
    return _digits(one) != _digits(other)


def urls_differ(one: str, other: str) -> bool:
    """Whether the addresses in one text are not those in the other, in any order. Letter case does not matter."""
    return _urls(one) != _urls(other)


def _digits(text: str) -> list[int]:
    return sorted(unicodedata.decimal(digit) for digit in _DIGIT.findall(text))


def _urls(text: str) -> list[str]:
    if "://" not in text and "www." not in text.lower():
        return []
    return sorted(url.rstrip(".,;:!?/").lower() for url in _URL.findall(text))
