"""Bitext mining: pairs of translations in two texts, by the margin score of Artetxe and Schwenk (2019).

Each text of both sides chooses the best of its k nearest neighbours on the other side. What they chose are the
candidates.

Legend: n texts of A, m texts of B, D width, k neighbours, c candidates.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from infoxlm_ds.atomic import new_file
from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import lines
from infoxlm_ds.evaluation.approximate import check_faiss, nearest_by_cells, recall
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.neighbours import NEIGHBOURS, Indices, Rows, Score, Vectors, nearest, rescored
from infoxlm_ds.evaluation.workspace import Texts, TextWriter, embed_texts, work_folder

Search = Literal["exact", "ivf"]
Retrieval = Literal["max", "intersect"]
LINE_ENDS = re.compile(r"[\t\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # of a table, for one reader or another


@dataclass(frozen=True)
class How:
    """`neighbours`: k; None: as the paper of the score. `retrieval`: "max" takes candidates by falling score, each text
    once; "intersect" takes those that both texts chose. `threshold`: pairs below it are left out."""

    score: Score = "ratio"
    neighbours: int | None = None
    search: Search = "exact"
    retrieval: Retrieval = "max"
    threshold: float | None = None

    @property
    def k(self) -> int:
        """Neighbours of each text; at least one, because candidates are found among them."""
        return self.neighbours or NEIGHBOURS[self.score] or 1


class Mined(NamedTuple):
    """Pairs, the best first: `score` [c], and the numbers of their texts in A and B, each [c]."""

    score: npt.NDArray[np.float64]
    a: Indices
    b: Indices


class Side(NamedTuple):
    """The neighbours of the texts of one side: `cosine` and `place` [n, k], the mean cosine `mean` [n]."""

    cosine: Vectors
    place: Indices
    mean: npt.NDArray[np.float64]


def mine(a: Path, b: Path, out: Path, model: Path, how: How, device: str | None = None) -> None:
    """Write the pairs of two files of lines to `out`: score, text of A, text of B, the best first.

    Memory holds neighbours, but no vectors and no texts. UserError if a file is missing, has no text or is not UTF-8,
    if faiss is missing, or as in `work_folder` and `SentenceEmbedder`."""
    if how.search == "ivf":
        check_faiss()
    for path in (a, b):
        if not path.is_file():
            raise UserError(f"{path}: no such file of text")
    with work_folder(out, model, (a, b)) as folder:
        texts_a, texts_b = read_texts(a, folder / "A.txt"), read_texts(b, folder / "B.txt")
        embedder = SentenceEmbedder(model, device=device, half=True)
        vectors_a = embed_texts(embedder, texts_a, folder / "A.npy", "A")
        vectors_b = embed_texts(embedder, texts_b, folder / "B.npy", "B")
        mined = mined_pairs(vectors_a, vectors_b, how, embedder.device)
        write_lines(out, _table(mined, texts_a, texts_b))
    print(f"{len(mined.score):,} pairs of {len(texts_a):,} and {len(texts_b):,} different texts", file=sys.stderr)


def read_texts(path: Path, out: Path) -> Texts:
    """The different lines of a file. Blank ones are left out; tabs and what some programs take for the end of a line
    become spaces. UserError if there is none."""
    writer = TextWriter(out)
    for _, line in lines(path):
        if text := LINE_ENDS.sub(" ", line).strip():
            writer.add(text)
    texts = writer.close()
    if not len(texts):
        raise UserError(f"{path} has no text: give a file with a sentence on each line")
    return texts


def mined_pairs(a: Rows, b: Rows, how: How, device: torch.device | None = None) -> Mined:
    """The pairs of L2-normalised vectors [n, D] and [m, D]."""
    forward, backward = _side(a, b, how, device, "A in B"), _side(b, a, how, device, "B in A")
    score_a, choice_a = _choices(forward, backward, how.score)
    score_b, choice_b = _choices(backward, forward, how.score)
    texts_a, texts_b = np.arange(len(a)), np.arange(len(b))
    if how.retrieval == "intersect":
        mutual = choice_b[choice_a] == texts_a
        mined = Mined(score_a[mutual], texts_a[mutual], choice_a[mutual])
    else:
        pairs = np.concatenate([texts_a, choice_b]), np.concatenate([choice_a, texts_b])
        mined = Mined(np.concatenate([score_a, score_b]), *pairs)
    return _each_text_once(mined, how.threshold)


def _side(query: Rows, key: Rows, how: How, device: torch.device | None, what: str) -> Side:
    name = f"searching {what}"
    if how.search == "exact":
        cosine, place = nearest(query, key, how.k, device, what=name)
    else:
        cosine, place = nearest_by_cells(query, key, how.k, what=name)
        found = recall(query, key, place, device)
        print(f"{name}: recall of the {how.k} nearest is {found:.4f}, on a sample", file=sys.stderr)
    there = np.isfinite(cosine)
    mean = cosine.sum(axis=1, dtype=np.float64, where=there) / np.maximum(there.sum(axis=1), 1)
    return Side(cosine, place, mean)


def _choices(of: Side, other: Side, score: Score) -> tuple[npt.NDArray[np.float64], Indices]:
    """The score and place [n] of the best neighbour of each text of a side; -inf without any neighbour."""
    cosine = np.where(np.isfinite(of.cosine), of.cosine, 0).astype(np.float64)
    scores = rescored(score, cosine, of.mean[:, None], other.mean[of.place])  # type: ignore[type-var]
    scores = np.where(np.isfinite(of.cosine), scores, -np.inf)
    best = scores.argmax(axis=1)[:, None]
    return np.take_along_axis(scores, best, 1)[:, 0], np.take_along_axis(of.place, best, 1)[:, 0]


def _each_text_once(candidates: Mined, threshold: float | None) -> Mined:
    """Candidates by falling score, each text in one of them only. Equal scores: in the order of the texts."""
    least = -np.inf if threshold is None else threshold
    taken_a, taken_b, kept = set[int](), set[int](), []
    for number in np.lexsort((candidates.b, candidates.a, -candidates.score)):
        score, a, b = candidates.score[number], int(candidates.a[number]), int(candidates.b[number])
        if not np.isfinite(score) or score < least:
            break
        if a not in taken_a and b not in taken_b:
            taken_a.add(a)
            taken_b.add(b)
            kept.append(number)
    chosen = np.array(kept, np.int64)
    return Mined(candidates.score[chosen], candidates.a[chosen], candidates.b[chosen])


def write_lines(out: Path, lines: Iterator[str]) -> None:
    """Write lines, which have their ends, as a whole or not at all."""
    with new_file(out) as file:
        file.writelines(line.encode() for line in lines)


def _table(mined: Mined, a: Texts, b: Texts) -> Iterator[str]:
    """A line `score<TAB>text of A<TAB>text of B` for each pair."""
    for score, text_a, text_b in zip(mined.score, a.at(mined.a), b.at(mined.b), strict=True):
        yield f"{score:.6f}\t{text_a}\t{text_b}\n"
