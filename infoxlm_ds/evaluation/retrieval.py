"""Cross-lingual sentence retrieval: is the translation of a sentence the nearest of all candidates?

Legend: n pairs, D width, V views (a layer and a pooling each).

A hit: the translation, or the same text in another row, scores strictly above every different text. A tie between
different texts is a miss, so an encoder that maps all sentences to one point has accuracy 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infoxlm_ds.config import Pooling
from infoxlm_ds.evaluation.approximate import nearest_by_cells, recall
from infoxlm_ds.evaluation.neighbours import NEIGHBOURS, Score, Vectors, nearest, rescored
from infoxlm_ds.evaluation.text import Pairs
from infoxlm_ds.model.sentence_vector import View

TextIds = npt.NDArray[np.int64]
Hits = npt.NDArray[np.bool_]
QUERIES, KEYS = 1024, 16384  # scores in memory at once
MANY = 1_000_000  # pairs, above which faiss finds the candidates
CANDIDATES = 16


class Embedder(Protocol):
    """Embeds sentences, as `SentenceEmbedder` does."""

    @property
    def views(self) -> Sequence[View]: ...

    @property
    def projected(self) -> bool: ...

    def embed(self, sentences: list[str], *, description: str = ...) -> Vectors:
        """L2-normalised vectors [V, n, D]."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy@1. `forward`: from pivot to language; `trigram_*`: the baseline on the same pairs. `low` and `high`: the
    95 % interval of the mean of both directions, over other samples of rows of the same file (see `bootstrap.py`)."""

    forward: float
    backward: float
    low: float
    high: float
    trigram_forward: float
    trigram_backward: float
    chance: float


@dataclass(frozen=True)
class RetrievalRow(Accuracy):
    """Accuracy@1 of one language by one view. `projected`: whether the model's projection was applied."""

    data: str
    lang: str
    n: int
    script: str
    cross_script: bool
    layer: int
    pooling: Pooling
    projected: bool
    score: Score


def embed_pivots(embedder: Embedder, pairs: Sequence[Pairs]) -> Iterator[Vectors]:
    """The vectors [V, n, D] of the pivot's texts of each language. Each different text is embedded once."""
    different = dict.fromkeys(text for of_language in pairs for text in of_language.pivot_text)
    position = {text: i for i, text in enumerate(different)}
    vectors = embedder.embed(list(position), description="pivot")
    for of_language in pairs:
        yield vectors[:, [position[text] for text in of_language.pivot_text]]


def pair_hits(pivot: Vectors, other: Vectors, pairs: Pairs, score: Score = "cosine") -> tuple[Hits, Hits]:
    """Which rows are hits, forward and backward, both [n]. `pivot` and `other` [n, D] are L2-normalised."""
    of_other, of_pivot = _text_ids(pairs.text), _text_ids(pairs.pivot_text)
    if _many(other):
        return _of_candidates(pivot, other, of_other, score), _of_candidates(other, pivot, of_pivot, score)
    around = _around(pivot, other, score)
    return _exact_hits(pivot, other, of_other, score, around), _exact_hits(other, pivot, of_pivot, score, around[::-1])


def pair_accuracy(pivot: Vectors, other: Vectors, pairs: Pairs) -> float:
    """Accuracy@1 of pairs whose vectors are `pivot` and `other` [n, D], the mean of both directions."""
    forward, backward = pair_hits(pivot, other, pairs)
    return float(forward.mean() + backward.mean()) / 2


def retrieval_accuracy(
    query: Vectors, key: Vectors, key_texts: Sequence[str] | None = None, score: Score = "cosine"
) -> float:
    """The fraction of rows i for which `key[i]` is the nearest key of `query[i]`; both [n, D], L2-normalised.

    Keys with equal `key_texts` count as the same answer.
    """
    texts = [str(number) for number in range(len(key))] if key_texts is None else key_texts
    ids = _text_ids(texts)
    if _many(key):
        return float(_of_candidates(query, key, ids, score).mean())
    return float(_exact_hits(query, key, ids, score, _around(query, key, score)).mean())


def trigram_accuracy(query_texts: Sequence[str], key_texts: Sequence[str]) -> tuple[float, float]:
    """(forward, backward) accuracy@1 of the cosine of character-trigram TF-IDF, an untrained baseline.

    The vocabulary and its weights come from these pairs, both sides together. Without any trigram, the baseline is
    chance.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # over a second, and ranks that train need none

    try:
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(3, 3)).fit([*query_texts, *key_texts])
    except ValueError:  # no text has three characters
        return 1 / len(key_texts), 1 / len(query_texts)
    query, key = vectorizer.transform(query_texts), vectorizer.transform(key_texts)
    forward = _exact(lambda rows, columns: (query[rows] @ key[columns].T).toarray(), _text_ids(key_texts))
    backward = _exact(lambda rows, columns: (key[rows] @ query[columns].T).toarray(), _text_ids(query_texts))
    return float(forward.mean()), float(backward.mean())


def _many(key: Vectors) -> bool:
    """Whether the search is approximate."""
    return len(key) > MANY and find_spec("faiss") is not None


def _around(query: Vectors, key: Vectors, score: Score) -> tuple[Vectors, Vectors]:
    """The mean cosine [n] of each query to its nearest keys, and of each key to its nearest queries; zeros if the score
    does not read them."""
    k = NEIGHBOURS[score]
    if not k:
        none = np.zeros(len(key), np.float32)
        return none, none
    return _mean(nearest(query, key, k)[0]), _mean(nearest(key, query, k)[0])


def _exact_hits(query: Vectors, key: Vectors, ids: TextIds, score: Score, around: tuple[Vectors, Vectors]) -> Hits:
    """`ids` [n]: of the keys' texts; `around`: as `_around` gives it."""
    around_query, around_key = around
    return _exact(
        lambda rows, columns: rescored(
            score, query[rows] @ key[columns].T, around_query[rows, None], around_key[None, columns]
        ),
        ids,
    )


def _of_candidates(query: Vectors, key: Vectors, ids: TextIds, score: Score) -> Hits:
    """Hits among the nearest that an approximate search finds. Standard error says how many of them it finds."""
    k = NEIGHBOURS[score]
    cosine, place = nearest_by_cells(query, key, max(k, CANDIDATES), what="searching")
    found = recall(query, key, place[:, :1])
    print(f"approximate search: recall of the nearest is {found:.4f}, on a sample", file=sys.stderr)
    around_query = around_key = np.zeros(len(key), np.float32)
    if k:
        around_query, around_key = _mean(cosine[:, :k]), _mean(nearest_by_cells(key, query, k)[0])
    scores = np.where(np.isfinite(cosine), rescored(score, cosine, around_query[:, None], around_key[place]), -np.inf)
    right = ids[place] == ids[:, None]
    return np.asarray(_best(scores, right) > _best(scores, ~right))


def _mean(cosine: Vectors) -> Vectors:
    there = np.isfinite(cosine)
    return np.asarray(np.where(there, cosine, 0).sum(1) / np.maximum(there.sum(1), 1), np.float32)


def _best(scores: Vectors, chosen: Hits) -> Vectors:
    """The highest of the chosen scores of each row; -inf if none is."""
    return np.asarray(np.where(chosen, scores, -np.inf).max(axis=1))


def _exact(scores: Callable[[slice, slice], Vectors], ids: TextIds) -> Hits:
    """[n]. `scores(rows, columns)`: that part of the n x n matrix; `ids` [n]: keys with equal ids are the same
    answer."""
    hits = np.zeros(len(ids), bool)
    for first in range(0, len(ids), QUERIES):
        rows = slice(first, first + QUERIES)
        best_right = best_wrong = np.full(len(ids[rows]), -np.inf)
        for start in range(0, len(ids), KEYS):
            columns = slice(start, start + KEYS)
            block = scores(rows, columns)
            right = ids[rows, None] == ids[None, columns]
            best_right, best_wrong = (
                np.maximum(best_right, _best(block, right)),
                np.maximum(best_wrong, _best(block, ~right)),
            )
        hits[rows] = best_right > best_wrong
    return hits


def _text_ids(texts: Sequence[str]) -> TextIds:
    """[n]: equal numbers for equal texts."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, position) for position, text in enumerate(texts)], dtype=np.int64)
