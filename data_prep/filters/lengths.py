"""Filters on the lengths of the two sides of a pair."""

from __future__ import annotations

from data_prep.filters.languages import base

# A character of these languages says about as much as this number of Latin letters.
WIDTHS = {"ja": 2, "ko": 2, "yue": 3, "zh": 3}


def lengths_differ(one: str, other: str, languages: tuple[str, str], ratio: float, above: int) -> bool:
    """Whether one text is longer than `above` and than `ratio` times the other, in letters."""
    length = len(one) * WIDTHS.get(base(languages[0]), 1)
    length_of_other = len(other) * WIDTHS.get(base(languages[1]), 1)
    if length < length_of_other:
        length, length_of_other = length_of_other, length
    return length > above and length > ratio * length_of_other
