"""The texts of a block: read, with the corpus' codes of languages, cleaned and filtered."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path

from data_prep.clean import clean
from data_prep.description import NAME, CorpusDescription, SourceDescription
from data_prep.filters.filters import Filters
from data_prep.filters.report import Report
from data_prep.rows import Block, Document, Fault, Notice, Row
from data_prep.sources import READERS
from infoxlm_ds.config import UserError
from infoxlm_ds.data.packs import text_id

MOST = 255  # negatives of a row


class Texts:
    """The texts of a block, cleaned and filtered. Reading them fills `report` and `notices`."""

    def __init__(self, description: CorpusDescription, base: Path, source: SourceDescription, block: Block) -> None:
        self.report, self.notices = Report(description.seed), list[str]()
        self._description, self._source, self._block = description, source, block
        self._clean, self._language = partial(clean, form=description.normalise), cache(self._code)
        self._filters = filters_of(description, base)

    def __iter__(self) -> Iterator[Row | Document]:
        """Rows and documents with the corpus' codes of languages, also rows of which nothing is left."""
        for item in READERS[self._source.format].read(self._source, self._block):
            if isinstance(item, Row):
                self.report.counts["rows"] += 1
                texts = self._row(item)
                yield Row(item.place, texts, self._negatives(item, texts) if item.negatives else {})
            elif isinstance(item, Document):
                self.report.counts["documents"] += 1
                self.report.counts["sentences"] += len(item.sentences)
                if (document := self._document(item)) is not None:
                    yield document
            elif isinstance(item, Notice):
                self.notices.append(f"{item.place}: {item.what}")
            else:
                self._fault(item)

    def _row(self, row: Row) -> dict[str, str]:
        texts: dict[str, str] = {}
        for code, text in row.texts.items():
            language, cleaned = self._language(code), self._clean(text)
            if language is None or not cleaned:
                continue
            if language in texts:
                self.report.counts["sides_of_a_language_the_row_has"] += 1  # two codes were renamed to one
            texts.setdefault(language, cleaned)
        if len(texts) > 2 and self._source.kind == "para":
            raise UserError(
                f"{row.place}: source {self._source.name}: kind para has two languages, but this row has "
                f"{len(texts)}: use kind nway"
            )
        return self._filters.row(row._replace(texts=dict(sorted(texts.items()))), self.report)

    def _negatives(self, row: Row, texts: dict[str, str]) -> dict[str, list[str]]:
        """The wrong sentences for a row of which `texts` are left: in its languages, different from its texts and from
        each other, MOST at most."""
        counts, kept = self.report.counts, dict[str, list[str]]()
        seen = {text_id(text) for text in texts.values()}
        for language, text in ((self._language(code), text) for code, wrong in row.negatives.items() for text in wrong):
            if language is None or language not in texts:
                counts["negatives_in_languages_that_the_row_lacks"] += 1
            elif (stays := self._filters.sentence(language, self._clean(text), row.place, self.report)) is not None:
                if (number := text_id(stays)) in seen:
                    counts["negatives_that_are_right_or_come_twice"] += 1
                elif len(seen) - len(texts) >= MOST:
                    counts[f"negatives_above_{MOST}_of_a_row"] += 1
                else:
                    kept.setdefault(language, []).append(stays)
                    seen.add(number)
        return kept

    def _document(self, document: Document) -> Document | None:
        language = self._language(document.language)
        if language is None:
            return None
        cleaned = (text for text in map(self._clean, document.sentences) if text)
        kept = (self._filters.sentence(language, text, document.place, self.report) for text in cleaned)
        return Document(document.place, language, [text for text in kept if text is not None])

    def _code(self, code: str) -> str | None:
        """The corpus' code of a language; None if the corpus has no place for it."""
        language = self._description.language(code)
        if language is not None and not re.fullmatch(NAME, language):
            raise UserError(
                f"source {self._source.name}: {language!r} cannot be a language code: give it another one in rename"
            )
        return language

    def _fault(self, fault: Fault) -> None:
        if self._description.on_error == "stop":
            raise UserError(f"{fault.place}: {fault.what}: correct the file, or set on_error: skip")
        self.report.drop("faults", fault.place, {"": fault.what})


def texts_of(item: Row | Document) -> Iterable[str]:
    """The texts of a row, before its negatives, or of a document, in their order."""
    if isinstance(item, Document):
        return item.sentences
    return itertools.chain(item.texts.values(), *item.negatives.values())


_filters: dict[str, Filters] = {}


def filters_of(description: CorpusDescription, base: Path) -> Filters:
    """The filters of a description, made once in a process."""
    key = f"{base}\0{description.filters.model_dump_json()}"
    if key not in _filters:
        _filters.clear()
        _filters[key] = Filters(description.filters, base)
    return _filters[key]
