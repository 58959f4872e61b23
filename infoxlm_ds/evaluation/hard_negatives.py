"""Hard negatives of n-way rows: for each row and language, the wrong texts that are nearest to the row's other texts.

The query is the mean of the row's vectors in its other languages; in a pair, that is the vector of the other text. The
nearest wrong texts are often right: translations of the same meaning in other words. So a text counts only if its
cosine is below a fraction of the right text's (NV-Retriever, Moreira et al., 2024, section 3: TopK-PercPos), and if no
row that has it shares a text with this row.

Legend: R rows, L languages, n different texts of a language, D width, Q rows searched at once, k neighbours.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from infoxlm_ds.config import UserError
from infoxlm_ds.data.packs import runs, text_id
from infoxlm_ds.data.text import lines
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.mining import write_lines
from infoxlm_ds.evaluation.neighbours import Indices, Rows, Vectors, nearest
from infoxlm_ds.evaluation.progress import blocks
from infoxlm_ds.evaluation.workspace import Texts, TextWriter, embed_texts, work_folder

MARGIN = 0.95  # of the right text's cosine
CHUNK = 2048  # rows that are searched at once
SPARE = 16  # neighbours that may turn out to be right
Found = dict[str, list[str]]


@dataclass(frozen=True)
class Table:
    """Which text each row has in each language: `numbers` [L, R], -1 where there is none."""

    languages: list[str]
    texts: list[Texts]
    numbers: Indices

    @cached_property
    def rows_of(self) -> list[tuple[Indices, Indices]]:
        """For each language, the rows ordered by their text, and where each text's rows begin [n + 1]."""
        orders = [np.argsort(numbers, kind="stable") for numbers in self.numbers]
        return [
            (order, np.searchsorted(numbers[order], np.arange(len(texts) + 1)))
            for order, numbers, texts in zip(orders, self.numbers, self.texts, strict=True)
        ]

    def right(self, language: int, rows: Indices, candidates: Indices) -> npt.NDArray[np.bool_]:
        """Whether `candidates` [Q, k], texts of a language, are in rows that share a text with `rows` [Q]."""
        order, starts = self.rows_of[language]
        text = candidates.ravel()
        count = starts[text + 1] - starts[text]
        having = order[runs(starts[text], count)]
        of = np.repeat(np.arange(text.size), count)
        row = rows[of // candidates.shape[1]]
        shared = ((self.numbers[:, having] == self.numbers[:, row]) & (self.numbers[:, row] >= 0)).any(axis=0)
        return (np.bincount(of[shared], minlength=text.size) > 0).reshape(candidates.shape)


def mine_hard_negatives(
    rows: Path, out: Path, model: Path, count: int, margin: float = MARGIN, device: str | None = None
) -> None:
    """Write the rows of a JSONL file with `negatives`, at most `count` in each language of a row.

    Memory holds numbers and hashes of texts, but no vectors and no texts. UserError if the file is missing or has
    another form, if no row has two texts, or as in `work_folder` and `SentenceEmbedder`."""
    if not rows.is_file():
        raise UserError(f"{rows}: no such file of rows")
    with work_folder(out, model, (rows,)) as folder:
        table = read_table(rows, folder)
        embedder = SentenceEmbedder(model, device=device, half=True)
        vectors = [
            embed_texts(embedder, texts, folder / f"{number}.npy", language)
            for number, (language, texts) in enumerate(zip(table.languages, table.texts, strict=True))
        ]
        search = Search(table, vectors, count, margin, embedder.device)
        write_lines(out, _with_negatives(rows, search.negatives()))


def read_table(path: Path, folder: Path) -> Table:
    """The texts of all rows. Texts with the same `text_id` are equal."""
    writers: dict[str, TextWriter] = {}
    columns: dict[str, array[int]] = {}
    row = 0
    for row, (_, texts) in enumerate(_trees(path), 1):
        for language, text in texts.items():
            if language not in writers:
                writers[language], columns[language] = TextWriter(folder / f"{len(writers)}.txt"), array("q")
            columns[language].extend([-1] * (row - 1 - len(columns[language])))
            columns[language].append(writers[language].add(text, text_id(text)))
    for column in columns.values():
        column.extend([-1] * (row - len(column)))
    numbers = np.array([*columns.values()], np.int64).reshape(len(columns), row)
    if not ((numbers >= 0).sum(axis=0) > 1).any():
        raise UserError(f"{path} has no row with texts in two languages")
    return Table([*columns], [writer.close() for writer in writers.values()], numbers)


def _trees(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """The object of each line, and its texts that are not blank."""
    for number, line in lines(path):
        try:
            tree = json.loads(line)
            texts = {language: text for language, text in tree["text"].items() if text.strip()}
            json.dumps(tree, ensure_ascii=False).encode()  # fails at half a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{path} line {number}: expected {{"text": {{language: sentence}}}}') from None
        yield tree, texts


@dataclass(frozen=True)
class Search:
    """`vectors`: of the texts of each language, [n, D]. `count`: negatives of a text. `margin`: see `MARGIN`."""

    table: Table
    vectors: Sequence[Rows]
    count: int
    margin: float
    device: torch.device | None

    def negatives(self) -> Iterator[Found]:
        """The negatives of each row, by language."""
        for part in blocks(self.table.numbers.shape[1], CHUNK, "searching"):
            numbers = self.table.numbers[:, part]
            sums, several = self._sums(numbers), (numbers >= 0).sum(axis=0) > 1
            found: list[Found] = [{} for _ in sums]
            for language, code in enumerate(self.table.languages):
                of = np.flatnonzero(several & (numbers[language] >= 0))
                for row, chosen in zip(of, self._nearest_wrong(language, part.start + of, sums[of]), strict=True):
                    if texts := list(self.table.texts[language].at(chosen)):
                        found[row][code] = texts
            yield from found

    def _sums(self, numbers: Indices) -> Vectors:
        """The sum of the vectors of each row [Q, D]."""
        sums = np.zeros((numbers.shape[1], self.vectors[0].shape[1]), np.float32)
        for of_language, vectors in zip(numbers, self.vectors, strict=True):
            there = np.flatnonzero(of_language >= 0)
            sums[there] += vectors[of_language[there]]
        return sums

    def _nearest_wrong(self, language: int, rows: Indices, sums: Vectors) -> Iterator[Indices]:
        """Numbers of the negatives of each row, the nearest first. `sums` [Q, D]: of the rows' vectors."""
        keys = self.vectors[language]
        right = np.array(keys[self.table.numbers[language, rows]], np.float32)
        query = sums - right
        query /= np.maximum(np.linalg.norm(query, axis=1, keepdims=True), 1e-12)
        below = self.margin * (query * right).sum(axis=1)
        cosine, place = nearest(query, keys, self.count + SPARE, self.device, below=below)
        wrong = np.isfinite(cosine) & ~self.table.right(language, rows, place)
        return (places[chosen][: self.count] for places, chosen in zip(place, wrong, strict=True))


def _with_negatives(path: Path, found: Iterator[Found]) -> Iterator[str]:
    texts = negatives = 0
    for (tree, of_row), wrong in zip(_trees(path), found, strict=True):
        texts, negatives = texts + len(of_row), negatives + sum(map(len, wrong.values()))
        yield json.dumps({**tree, "negatives": wrong}, ensure_ascii=False) + "\n"
    print(f"{negatives:,} hard negatives for {texts:,} texts", file=sys.stderr)
