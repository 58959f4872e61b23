"""Applies all filters, in this order, which is the order of docs/data.md.

To each side of a row: too_long, before anything is stripped. To it and to each monolingual sentence: placeholders,
markup, empty, letters, script, repetition, language_id, held_out.
To each pair of a side with the row's reference side: copy, length_ratio, numbers, urls.
A text is dropped for the first reason that holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from data_prep.filters.copies import is_copy
from data_prep.filters.held_out import HeldOutFilter
from data_prep.filters.language_id import LanguageFilter
from data_prep.filters.lengths import lengths_differ
from data_prep.filters.letters import is_of_another_script, too_few_letters
from data_prep.filters.markup import has_markup, has_placeholders, strip_markup, strip_placeholders
from data_prep.filters.mismatches import numbers_differ, urls_differ
from data_prep.filters.report import Report
from data_prep.filters.settings import FilterSettings
from data_prep.filters.words import repeats_itself
from data_prep.rows import Row

KEPT = 2**16  # verdicts: the same texts come again and again in real files
SideFilter = Callable[[str, str], bool]  # text, language
PairFilter = Callable[[str, str, tuple[str, str]], bool]  # text, reference text, their languages


class Filters:
    """The filters of one description. Whether a text stays depends on its row and the settings only.

    `folder`: of the description; paths are relative to it. UserError if a file or library is missing.
    """

    def __init__(self, settings: FilterSettings, folder: Path) -> None:
        self._settings = settings
        self._sides = _side_filters(settings, folder)
        self._pairs = _pair_filters(settings)
        self._verdict = functools.lru_cache(KEPT)(self._judged)

    def row(self, row: Row, report: Report) -> dict[str, str]:
        """The sides that stay; of cleaned texts. A pair filter drops the side that is not the reference; if the row has
        only these two, both."""
        kept: dict[str, str] = {}
        longest = self._settings.max_characters
        for language, text in row.texts.items():
            if longest is not None and len(text) > longest:
                report.drop("too_long", row.place, {language: text})
                continue
            stays = self.sentence(language, text, row.place, report)
            if stays is not None:
                kept[language] = stays
        if len(kept) < 2 or not self._pairs:
            return kept
        reference = self._settings.reference if self._settings.reference in kept else min(kept)
        wrong = [
            language
            for language, text in kept.items()
            if language != reference and self._is_wrong_pair((language, reference), text, kept[reference], row, report)
        ]
        if wrong and len(kept) == 2:
            return {}
        return {language: text for language, text in kept.items() if language not in wrong}

    def sentence(self, language: str, text: str, place: str, report: Report) -> str | None:
        """The text as the side filters leave it; None if it is dropped."""
        stripped, reason = self._verdict(language, text)
        if reason:
            report.drop(reason, place, {language: text})
            return None
        return stripped

    def _judged(self, language: str, text: str) -> tuple[str, str]:
        """The stripped text, and why it is dropped; "" if it is not."""
        stripped = self._strip(text)
        return stripped, next((reason for reason, drops in self._sides if drops(stripped, language)), "")

    def _strip(self, text: str) -> str:
        if self._settings.placeholders == "strip":
            text = strip_placeholders(text)
        return strip_markup(text) if self._settings.markup == "strip" else text

    def _is_wrong_pair(self, languages: tuple[str, str], text: str, reference: str, row: Row, report: Report) -> bool:
        for reason, drops in self._pairs:
            if drops(text, reference, languages):
                report.drop(reason, row.place, {languages[1]: reference, languages[0]: text})
                return True
        return False


def _side_filters(settings: FilterSettings, folder: Path) -> list[tuple[str, SideFilter]]:
    filters: list[tuple[str, SideFilter]] = []
    if settings.placeholders == "drop":
        filters.append(("placeholders", lambda text, _: has_placeholders(text)))
    if settings.markup == "drop":
        filters.append(("markup", lambda text, _: has_markup(text)))
    filters.append(("empty", lambda text, _: not text))
    if (letters := settings.letters) is not None:
        filters.append(("letters", lambda text, _: too_few_letters(text, letters)))
    if (script := settings.script) is not None:
        limits = script.other, script.latin, script.above
        filters.append(("script", lambda text, language: is_of_another_script(text, language, *limits)))
    if (repetition := settings.repetition) is not None:
        filters.append(("repetition", lambda text, _: repeats_itself(text, repetition.share, repetition.times)))
    if settings.language_id is not None:
        filters.append(("language_id", LanguageFilter(settings.language_id, folder).is_of_another_language))
    if settings.held_out is not None:
        held_out = HeldOutFilter(settings.held_out, folder)
        filters.append(("held_out", lambda text, _: held_out.is_held_out(text)))
    return filters


def _pair_filters(settings: FilterSettings) -> list[tuple[str, PairFilter]]:
    filters: list[tuple[str, PairFilter]] = []
    if (words := settings.copied_words) is not None:
        filters.append(("copy", lambda one, other, languages: is_copy(one, other, languages, words)))
    if (lengths := settings.length_ratio) is not None:
        filters.append(
            ("length_ratio", lambda one, other, codes: lengths_differ(one, other, codes, lengths.ratio, lengths.above))
        )
    if settings.numbers:
        filters.append(("numbers", lambda one, other, _: numbers_differ(one, other)))
    if settings.urls:
        filters.append(("urls", lambda one, other, _: urls_differ(one, other)))
    return filters
