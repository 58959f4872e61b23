"""Cross-lingual sentence retrieval: for each sentence, is its translation the nearest of all candidates by cosine?

Legend: n pairs, D width, L layers.

A hit is a translation, or another row's identical text, that scores strictly above every different text. Ties between
different texts are misses: an encoder that maps all sentences to one point scores 0, not what the sort order gives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation import Pooling
from infoxlm_ds.evaluation.parallel_text import Pairs, matches, pairs_with_pivot, read_rows

Vectors = npt.NDArray[np.float32]
TextIds = npt.NDArray[np.int64]


class Embedder(Protocol):
    """What embeds the sentences, as `SentenceEmbedder` does."""

    layers: list[int]
    pooling: Pooling

    def embed(self, sentences: list[str], *, description: str = ...) -> Vectors:
        """L2-normalised vectors [L, n, D]."""


@dataclass(frozen=True)
class RetrievalRow:
    """Accuracy@1 of one language at one layer; forward is pivot -> language, trigram the baseline on the same pairs."""

    data: str
    lang: str
    n: int
    cross_script: bool
    layer: int
    pooling: Pooling
    forward: float
    backward: float
    trigram_forward: float
    trigram_backward: float
    chance: float


def retrieval_accuracy(
    query: Vectors, key: Vectors, key_texts: Sequence[str] | None = None, chunk: int = 1024
) -> float:
    """The share of rows i whose `key[i]` is the nearest key of `query[i]`; both [n, D], L2-normalised.

    Keys with equal `key_texts` are one answer; without texts every key is its own. Memory: chunk x n scores.
    """
    ids = np.arange(len(key)) if key_texts is None else _text_ids(key_texts)
    return _accuracy(lambda start, end: query[start:end] @ key.T, ids, chunk)


def trigram_accuracy(query_texts: Sequence[str], key_texts: Sequence[str], chunk: int = 1024) -> tuple[float, float]:
    """(forward, backward) accuracy@1 of character-trigram TF-IDF cosine, which knows nothing of any language.

    The vocabulary and its weights come from these very pairs, both sides together.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # over a second, and ranks that train need none

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(3, 3)).fit([*query_texts, *key_texts])
    query, key = vectorizer.transform(query_texts), vectorizer.transform(key_texts)
    forward = _accuracy(lambda start, end: (query[start:end] @ key.T).toarray(), _text_ids(key_texts), chunk)
    backward = _accuracy(lambda start, end: (key[start:end] @ query.T).toarray(), _text_ids(query_texts), chunk)
    return forward, backward


def read_pairs(paths: Sequence[Path], pivot: str, languages: Sequence[str], min_pairs: int) -> dict[str, list[Pairs]]:
    """The pairs of each file, by its path. Raises UserError as `pairs_with_pivot`, or for a language no file has."""
    pairs = {str(path): pairs_with_pivot(read_rows(path), pivot, languages, min_pairs, str(path)) for path in paths}
    found = {one.language for of_file in pairs.values() for one in of_file}
    for wanted in languages:
        if not any(matches(code, wanted) for code in found):
            raise UserError(f"--languages {wanted}: no file has {min_pairs} pairs of {wanted!r} with {pivot!r}")
    return pairs


def evaluate_retrieval(embedder: Embedder, data: str, pairs: Sequence[Pairs]) -> list[RetrievalRow]:
    """One row for every layer and every language of `pairs`, the layers outermost; `data` names the file."""
    position = {text: i for i, text in enumerate(dict.fromkeys(text for one in pairs for text in one.pivot_text))}
    pivots = embedder.embed(list(position), description="pivot")
    rows = []
    for one in pairs:
        pivot = pivots[:, [position[text] for text in one.pivot_text]]
        rows += _rows_of_language(embedder, data, one, pivot)
    return sorted(rows, key=lambda row: row.layer)


def _rows_of_language(embedder: Embedder, data: str, pairs: Pairs, pivot: Vectors) -> list[RetrievalRow]:
    other = embedder.embed(pairs.text, description=pairs.language)
    trigram_forward, trigram_backward = trigram_accuracy(pairs.pivot_text, pairs.text)
    return [
        RetrievalRow(
            data=data,
            lang=pairs.language,
            n=len(pairs.text),
            cross_script=pairs.cross_script,
            layer=layer,
            pooling=embedder.pooling,
            forward=retrieval_accuracy(pivot[index], other[index], pairs.text),
            backward=retrieval_accuracy(other[index], pivot[index], pairs.pivot_text),
            trigram_forward=trigram_forward,
            trigram_backward=trigram_backward,
            chance=1 / len(pairs.text),
        )
        for index, layer in enumerate(embedder.layers)
    ]


def _accuracy(scores: Callable[[int, int], Vectors], ids: TextIds, chunk: int) -> float:
    """`scores(start, end)` are those rows of the n x n matrix; `ids` [n] are equal where keys are the same answer."""
    hits = 0
    for start in range(0, len(ids), chunk):
        block = scores(start, start + chunk)
        right = ids[start : start + chunk, None] == ids[None, :]
        best_right = np.where(right, block, -np.inf).max(axis=1)
        best_wrong = np.where(right, -np.inf, block).max(axis=1)
        hits += int((best_right > best_wrong).sum())
    return hits / len(ids)


def _text_ids(texts: Sequence[str]) -> TextIds:
    """[n]: equal numbers for equal texts."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, position) for position, text in enumerate(texts)], dtype=np.int64)
