"""Map: reads one block of a source, cleans, filters and encodes it, and writes its rows sorted by a keyed hash.

Legend: n rows, m sides of all rows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.description import CorpusDescription, SourceDescription
from data_prep.encode import Encoder
from data_prep.filters.report import Report
from data_prep.rows import Block, Document, Row
from data_prep.table import WRONG, SpillWriter, Table
from data_prep.texts import Texts, texts_of
from infoxlm_ds.data.packs import content_id, runs, text_id

CHUNK, CHARACTERS = 4096, 2**22  # rows or documents that are encoded together, at most; their characters, about
GROUP = 2**26  # bytes of tables in memory, about


class Setting(NamedTuple):
    """What all tasks of a build share. `pieces`: SentencePiece may encode; `buckets`: of a spill."""

    description: CorpusDescription
    base: Path
    tokenizer: Path
    unknown: int = 0
    pieces: bool = False
    buckets: int = 1


class MapTask(NamedTuple):
    """A block of source number `source` of the description."""

    setting: Setting
    source: int
    block: Block


def map_block(task: MapTask, out: Path) -> None:
    """Write the spill of a block: rows of its source, and blocks of monolingual text for mono.<language>."""
    setting = task.setting
    source = setting.description.sources[task.source]
    texts = Texts(setting.description, setting.base, source, task.block)
    made = _Rows(setting, source, texts.report)
    with SpillWriter(out, setting.buckets) as spill:
        for chunk in _chunks(texts):
            made.add(chunk)
            if made.bytes > GROUP:
                made.write(spill)
        made.write(spill)
        spill.end(made.languages, texts.report.tree() | {"notices": texts.notices})


def _chunks(items: Iterable[Row | Document]) -> Iterator[list[Row | Document]]:
    chunk: list[Row | Document] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += sum(map(len, texts_of(item)))
        if len(chunk) == CHUNK or characters > CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _Sides(NamedTuple):
    """The sides of rows, one behind the other: side j has the ids `pool[starts[j] : starts[j] + lengths[j]]`."""

    pool: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    text_ids: np.ndarray


class _Rows:
    """Tokenised rows by the source of the corpus to which they go."""

    def __init__(self, setting: Setting, source: SourceDescription, report: Report) -> None:
        self._encoder = encoder_of(setting.tokenizer, setting.unknown, setting.pieces)
        self._longest, self._seed = setting.description.max_tokens, setting.description.seed
        self._source, self._counts = source, report.counts
        self._tables: dict[str, list[Table]] = {}
        self._languages: dict[str, int] = {}
        self.languages: dict[str, list[str]] = {}  # that the written tables of each source number
        self.bytes = 0  # of what is not written yet

    def write(self, spill: SpillWriter) -> None:
        """Write the rows of each source, and forget them."""
        codes = list(self._languages)
        for name, parts in sorted(self._tables.items()):
            table, known = Table.concatenate(parts), self.languages.setdefault(name, [])
            used, numbers = np.unique(table.languages % WRONG, return_inverse=True)
            known += [code for code in (codes[number] for number in used) if code not in known]
            places = np.array([known.index(codes[number]) for number in used], np.uint16)
            spill.add(name, replace(table, languages=places[numbers] + table.languages // WRONG * WRONG))
        self._tables, self.bytes = {}, 0

    def add(self, chunk: list[Row | Document]) -> None:
        found: dict[str, int] = {}  # different texts: real ones come again and again
        number = np.array([found.setdefault(t, len(found)) for item in chunk for t in texts_of(item)], np.int64)
        texts = list(found)
        ids, lengths, spelled = self._encoder.encode(texts)
        self._counts["special_tokens_in_text"] += int(spelled[number].sum())
        ends = np.cumsum(lengths)
        if self._source.kind != "mono":
            rows = [item for item in chunk if isinstance(item, Row)]
            names = np.array([text_id(text) for text in texts], np.uint64)
            sides = _Sides(ids, (ends - lengths)[number], lengths[number], names[number])
            self._add(self._source.name, self._parallel(rows, sides))
        if self._source.kind == "mono" or self._source.mono:
            different = np.split(ids, ends[:-1])
            self._monolingual(chunk, [different[i] for i in number.tolist()])

    def _add(self, name: str, table: Table) -> None:
        if len(table):
            self._tables.setdefault(name, []).append(table)
            self.bytes += table.nbytes

    def _parallel(self, rows: list[Row], sides: _Sides) -> Table:
        """The rows that have at least two sides of at most `max_tokens` pieces, with their negatives. Rows with the
        same sides are equal."""
        of_rows = [_codes(row) for row in rows]
        codes = list(itertools.chain.from_iterable(of_rows))
        counts = np.fromiter(map(len, of_rows), np.int64, len(rows))
        row = np.repeat(np.arange(len(rows)), counts)
        numbers = {code: self._number(code) for code in dict.fromkeys(codes)}
        place = np.arange(len(codes)) - (np.cumsum(counts) - counts)[row]
        right = place < np.fromiter((len(r.texts) for r in rows), np.int64, len(rows))[row]  # no negative
        too_long = sides.lengths > self._longest
        kept = ~too_long & (sides.lengths > 0)
        enough = np.bincount(row[kept & right], minlength=len(rows)) >= 2
        self._counts["sides_too_long"] += int((too_long & right).sum())
        self._counts["rows_with_less_than_two_sides"] += int((~enough).sum())
        (side,) = np.nonzero(kept & enough[row])
        if not right.all():
            self._counts["negatives_too_long"] += int((too_long & ~right).sum())
            self._counts["negatives"] += int((~right[side]).sum())
        languages = np.array([numbers[codes[i]] for i in side.tolist()], np.uint16)
        tags = np.array([content_id(code.encode()) for code in self._languages], np.uint64)[languages]
        named = np.stack([tags, sides.text_ids[side]], axis=1)[right[side]].tobytes()
        ends = (16 * np.cumsum(np.bincount(row[side[right[side]]], minlength=len(rows))[enough])).tolist()
        texts_of_rows = (named[start:end] for start, end in itertools.pairwise([0, *ends]))
        return Table(
            keys=self._keys(self._source.name, texts_of_rows, len(ends)),
            sides=np.bincount(row[side], minlength=len(rows))[enough].astype(np.uint16),
            languages=languages + np.where(right[side], 0, WRONG).astype(np.uint16),
            lengths=sides.lengths[side].astype(np.uint16),
            text_ids=sides.text_ids[side],
            ids=sides.pool[runs(sides.starts[side], sides.lengths[side])],
        )

    def _monolingual(self, chunk: list[Row | Document], ids: list[np.ndarray]) -> None:
        """Blocks of at most `max_tokens` pieces by language. A block holds whole consecutive sentences of one document;
        a longer sentence is split. Each side of a row is a document."""
        blocks: dict[str, list[np.ndarray]] = {}
        at = 0
        for item in chunk:
            if isinstance(item, Row):
                for language in item.texts:
                    blocks.setdefault(language, []).extend(self._blocks(ids[at : at + 1]))
                    at += 1
                at += sum(map(len, item.negatives.values()))
            else:
                end = at + len(item.sentences)
                blocks.setdefault(item.language, []).extend(self._blocks(ids[at:end]))
                at = end
        for language, of_language in blocks.items():
            name, data = f"mono.{language}", [block.tobytes() for block in of_language]
            lengths = np.array([len(block) for block in of_language], np.uint16)
            n = len(lengths)
            table = Table(
                keys=self._keys(name, data, n),
                sides=np.ones(n, np.uint16),
                languages=np.full(n, self._number(language), np.uint16),
                lengths=lengths,
                text_ids=np.array([content_id(block) for block in data], np.uint64),
                ids=np.concatenate([np.zeros(0, np.uint32), *of_language]),
            )
            self._add(name, table)

    def _blocks(self, sentences: list[np.ndarray]) -> Iterator[np.ndarray]:
        block: list[np.ndarray] = []
        size = 0
        for ids in sentences:
            pieces = (
                [ids] if len(ids) <= self._longest else np.split(ids, range(self._longest, len(ids), self._longest))
            )
            self._counts["sentences_split"] += len(pieces) > 1
            for piece in pieces:
                if block and size + len(piece) > self._longest:
                    yield np.concatenate(block)
                    block, size = [], 0
                block.append(piece)
                size += len(piece)
        if size:
            yield np.concatenate(block)

    def _number(self, language: str) -> int:
        return self._languages.setdefault(language, len(self._languages))

    def _keys(self, source: str, rows: Iterable[bytes], n: int) -> np.ndarray:
        """Keyed hashes [n, 2] of rows. Sorting by them shuffles the rows of a source, whatever their order was."""
        key = hashlib.blake2b(f"{self._seed}/{source}".encode(), digest_size=16).digest()
        digests = b"".join(hashlib.blake2b(row, digest_size=16, key=key).digest() for row in rows)
        return np.frombuffer(digests, np.uint64).reshape(n, 2)


def _codes(row: Row) -> list[str]:
    """The language of each text of a row, in the order of `texts_of`."""
    return [*row.texts, *(code for code, wrong in row.negatives.items() for _ in wrong)]


@lru_cache(1)
def encoder_of(tokenizer: Path, unknown: int, pieces: bool) -> Encoder:
    """The encoder of a tokenizer folder, made once in a process."""
    return Encoder(tokenizer, unknown, pieces)
