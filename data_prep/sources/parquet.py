"""Parquet files. `columns` names the column of each language; without it, columns are named as `languages`. With kind
mono, each value is a document, a text or a list of sentences, in the column `text` unless `columns` names another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.description import SourceDescription
from data_prep.rows import Block, Document, Fault, Item, Part, Row
from data_prep.sources import files, lines
from infoxlm_ds.config import UserError

ROWS = 1024  # that are converted at a time


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    """Blocks of whole row groups."""
    assert source.path is not None
    for file in files.find(source.path, base):
        with files.raw(file) as stored:
            groups = _open(file, stored).metadata
            start, line, rows, taken = 0, 0, 0, 0
            for i in range(groups.num_row_groups):
                rows, taken = rows + groups.row_group(i).num_rows, taken + groups.row_group(i).total_byte_size
                if taken >= size or i + 1 == groups.num_row_groups:
                    yield Block((Part(file, start, i + 1, line),))
                    start, line, rows, taken = i + 1, line + rows, 0, 0


def _open(file: str, stored: Any) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: format parquet needs pyarrow: pip install 'infoxlm-ds[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(stored)
    except (pyarrow.ArrowException, *files.DAMAGED) as error:
        raise files.damage(file, error) from None


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    (part,) = block.parts
    mono = source.kind == "mono"
    columns = source.columns or {language: "text" if mono else language for language in source.languages}
    for number, values in enumerate(_values(part, list(columns.values())), part.line + 1):
        place = f"{part.file} row {number}"
        row = dict(zip(columns, values, strict=True))
        item = _document(place, *row.popitem()) if mono else _row(place, row)
        if item is not None:
            yield item


def _values(part: Part, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """The values of the columns in each row."""
    with files.raw(part.file) as stored:
        opened = _open(part.file, stored)
        missing = [column for column in columns if column not in opened.schema_arrow.names]
        if missing:
            raise UserError(f"{part.file}: has no column {missing[0]!r}: name the columns of languages by columns")
        number = part.line
        batches = opened.iter_batches(ROWS, row_groups=range(part.start, part.end), columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # pyarrow tells damage by its own exceptions, OSError and others
                raise files.damage(f"{part.file} after row {number}", error) from None
            if batch is None:
                return
            number += batch.num_rows
            yield from zip(*([_value(value) for value in batch.column(column)] for column in columns), strict=True)


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _row(place: str, row: dict[str, Any]) -> Row | Fault:
    texts = {language: text for language, text in row.items() if text is not None}
    for language, text in texts.items():
        problem = _bad(text)
        if problem:
            return Fault(place, f"the sentence of {language!r} {problem}")
    return Row(place, {language: text for language, text in texts.items() if text.strip()})


def _document(place: str, language: str, text: Any) -> Document | Fault | None:
    sentences = [] if text is None else text.split("\n") if isinstance(text, str) else text
    for sentence in sentences if isinstance(sentences, list) else [sentences]:
        problem = _bad(sentence)
        if problem:
            return Fault(place, f"a sentence {problem}")
    kept = [sentence for sentence in sentences if sentence.strip()]
    return Document(place, language, kept) if kept else None


def _bad(text: Any) -> str:
    return "is not UTF-8" if isinstance(text, UnicodeDecodeError) else lines.bad_text(text)
