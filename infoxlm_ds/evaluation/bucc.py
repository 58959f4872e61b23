"""BUCC: find the translations in two texts of which some sentences are translations (Zweigenbaum et al., 2017, 2018).

A file holds lines `id<TAB>text`, the gold file `id<TAB>id`. The threshold of the score is the one with the highest F1
on one part of a language; precision, recall and F1 of another part follow from it. Pairs of equal texts are one pair.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import lines
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.mining import How, Mined, mined_pairs
from infoxlm_ds.evaluation.neighbours import Score
from infoxlm_ds.evaluation.workspace import Texts, TextWriter, embed_texts

NAME = re.compile(r"(?:.+\.)?(?P<pair>(?P<language>[a-z]{2,3})-en)\.(?P<part>\w+)\.gold")
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BuccRow:
    """The result of one language on `part`. `threshold` is the best one on `tuned_on`; `gold`: pairs to be found."""

    language: str
    part: str
    tuned_on: str
    score: Score
    threshold: float
    gold: int
    found: int
    precision: float
    recall: float
    f1: float


class Judged(NamedTuple):
    """Mined pairs, the best first: their `scores` and whether they are `right`, both [c]. `gold`: pairs to be found."""

    scores: Numbers
    right: npt.NDArray[np.bool_]
    gold: int


def best_threshold(judged: Judged) -> float:
    """The threshold with the highest F1: halfway between the last score that counts and the next."""
    if not judged.right.any():
        return float("inf")
    found = np.arange(1, len(judged.scores) + 1)
    f1 = 2 * judged.right.cumsum() / (found + judged.gold)
    following = np.append(judged.scores[1:], judged.scores[-1] - 1)
    f1[judged.scores == following] = -1  # no threshold lies between equal scores
    best = int(f1.argmax())
    if best == len(f1) - 1:
        return float(judged.scores[best])
    return float(judged.scores[best] + following[best]) / 2


def measured(judged: Judged, threshold: float) -> tuple[int, float, float, float]:
    """The number of pairs that reach the threshold, their precision, recall and F1."""
    chosen = judged.scores >= threshold
    found, right = int(chosen.sum()), int(judged.right[chosen].sum())
    return found, right / max(found, 1), right / max(judged.gold, 1), 2 * right / max(found + judged.gold, 1)


def evaluate_bucc(embedder: SentenceEmbedder, data: Path, tune: str, part: str, score: Score) -> Iterator[BuccRow]:
    """A row for each language of a folder that has gold pairs. UserError if there is none, or as in `_read`.

    Without gold pairs of `tune` or of `part`, the other one is used for both."""
    chosen = _chosen(data, tune, part)
    for language, golds in chosen.items():  # a mistake in the last language costs no work on the first
        for path in golds.values():
            with tempfile.TemporaryDirectory() as work:
                _read_all(path, language, Path(work))
    for language, golds in chosen.items():
        there = [*golds]
        judged = {name: _judged(embedder, path, language, name, score) for name, path in golds.items()}
        threshold = best_threshold(judged[there[0]])
        found, precision, recall, f1 = measured(judged[there[-1]], threshold)
        gold = judged[there[-1]].gold
        yield BuccRow(language, there[-1], there[0], score, threshold, gold, found, precision, recall, f1)


def print_bucc(rows: list[BuccRow], console: Console) -> None:
    """A table with a line for each language."""
    table = Table(title=f"BUCC, score {rows[0].score}", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("language", "part"):
        table.add_column(heading, no_wrap=True)
    for heading in ("threshold", "gold", "found", "precision", "recall", "F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (f"{value:.4f}" for value in (row.precision, row.recall, row.f1))
        counts = f"{row.threshold:.4f}", f"{row.gold:,}", f"{row.found:,}"
        part = row.part + " *" * (row.tuned_on == row.part)
        table.add_row(row.language, part, *counts, *figures)
    if any(row.tuned_on == row.part for row in rows):
        table.caption = "* the threshold is the best one for this same part, so F1 is too good"
    console.print(table)


def _chosen(data: Path, tune: str, part: str) -> dict[str, dict[str, Path]]:
    """The gold files of both parts, or of the one that has one, by language."""
    chosen: dict[str, dict[str, Path]] = {}
    for language, golds in sorted(_golds(data).items()):
        chosen[language] = {name: golds[name] for name in (tune, part) if name in golds}
        if not chosen[language]:
            have = ", ".join(sorted(golds))
            raise UserError(f"{data}: {language}-en has gold pairs of {have} only: choose with --tune and --part")
    return chosen


def _golds(data: Path) -> dict[str, dict[str, Path]]:
    """The gold files of a folder and its subfolders, by language and part."""
    if not data.is_dir():
        raise UserError(f"{data}: no such folder: give the one with the files of BUCC")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(data.rglob("*.gold")):
        if name := NAME.fullmatch(path.name):
            found.setdefault(name["language"], {})[name["part"]] = path
    if not found:
        raise UserError(f"{data}: no gold pairs: expected files such as de-en.training.gold, beside .de and .en")
    return found


def _judged(embedder: SentenceEmbedder, gold: Path, language: str, part: str, score: Score) -> Judged:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        texts, english, right = _read_all(gold, language, folder)
        vectors = [
            embed_texts(embedder, of_side, folder / f"{code}.npy", f"{language}-en {part}, {code}")
            for of_side, code in ((texts, language), (english, "en"))
        ]
        return judge(mined_pairs(vectors[0], vectors[1], How(score), embedder.device), right)


def _read_all(gold: Path, language: str, folder: Path) -> tuple[Texts, Texts, set[tuple[int, int]]]:
    """Both sides' texts, which go to a folder, and the gold pairs as numbers of them."""
    (texts, ids), (english, english_ids) = (
        _read(gold.with_suffix(f".{code}"), folder / f"{code}.txt") for code in (language, "en")
    )
    return texts, english, _gold(gold, ids, english_ids)


def judge(mined: Mined, gold: set[tuple[int, int]]) -> Judged:
    """Which mined pairs are in `gold`."""
    pairs = zip(mined.a.tolist(), mined.b.tolist(), strict=True)
    return Judged(mined.score, np.array([pair in gold for pair in pairs], bool), len(gold))


def _read(path: Path, out: Path) -> tuple[Texts, dict[str, int]]:
    """The different texts of a file, and the number of the text of each id. UserError names the line."""
    writer, numbers = TextWriter(out), dict[str, int]()
    for number, line in lines(path):
        name, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise UserError(f"{path} line {number}: expected an id, a tab and a text")
        numbers[name] = writer.add(text.strip())
    if not numbers:
        raise UserError(f"{path} has no text")
    return writer.close(), numbers


def _gold(path: Path, ids: dict[str, int], english: dict[str, int]) -> set[tuple[int, int]]:
    """The pairs of a gold file, as numbers of texts; English may come first or second."""
    pairs = set()
    for number, line in lines(path):
        names = line.strip().split("\t")
        if len(names) == 2 and names[0] in english and names[1] in ids:
            names.reverse()
        if len(names) != 2 or names[0] not in ids or names[1] not in english:
            raise UserError(f"{path} line {number}: expected two ids of the texts beside it, with a tab between")
        pairs.add((ids[names[0]], english[names[1]]))
    return pairs
