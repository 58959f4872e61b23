"""The filter of sides that were not translated."""

from __future__ import annotations

from data_prep.filters.languages import are_near


def is_copy(text: str, reference: str, languages: tuple[str, str], words: int) -> bool:
    """Whether the texts are equal but for case, and have more than `words` words that do not begin with a capital: most
    names do, and are rightly the same in each language. False for near languages, whose texts are often equal."""
    if len(text) != len(reference) or text.casefold() != reference.casefold() or are_near(*languages):
        return False
    return sum(word[0].isalpha() and not word[0].isupper() for word in text.split()) > words
