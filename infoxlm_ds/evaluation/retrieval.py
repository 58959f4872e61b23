"""Cross-lingual sentence retrieval: is the translation of a sentence the nearest of all candidates by cosine?

Legend: n pairs, D width, L layers.

A hit: the translation, or the same text in another row, scores strictly above every different text. A tie between
different texts is a miss, so an encoder that maps all sentences to one point has accuracy 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infoxlm_ds.config import Pooling, UserError
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.evaluation.text import Pairs, matches, pairs_with_pivot

Vectors = npt.NDArray[np.float32]
TextIds = npt.NDArray[np.int64]


class Embedder(Protocol):
    """Embeds sentences, as `SentenceEmbedder` does."""

    layers: list[int]
    pooling: Pooling
    projected: bool

    def embed(self, sentences: list[str], *, description: str = ...) -> Vectors:
        """L2-normalised vectors [L, n, D]."""


@dataclass(frozen=True)
class RetrievalRow:
    """Accuracy@1 of one language at one layer. `forward`: from pivot to language; `trigram_*`: the baseline on the same
    pairs."""

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
    projected: bool = False  # whether the model's projection was applied


def retrieval_accuracy(
    query: Vectors, key: Vectors, key_texts: Sequence[str] | None = None, chunk: int = 1024
) -> float:
    """The fraction of rows i for which `key[i]` is the nearest key of `query[i]`; both [n, D], L2-normalised.

    Keys with equal `key_texts` count as the same answer. Memory: chunk x n scores.
    """
    ids = np.arange(len(key)) if key_texts is None else _text_ids(key_texts)
    return _accuracy(lambda start, end: query[start:end] @ key.T, ids, chunk)


def pair_accuracy(pivot: Vectors, other: Vectors, pairs: Pairs) -> float:
    """Accuracy@1 of pairs whose vectors are `pivot` and `other` [n, D], the mean of both directions."""
    forward = retrieval_accuracy(pivot, other, pairs.text)
    return (forward + retrieval_accuracy(other, pivot, pairs.pivot_text)) / 2


def trigram_accuracy(query_texts: Sequence[str], key_texts: Sequence[str], chunk: int = 1024) -> tuple[float, float]:
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
    forward = _accuracy(lambda start, end: (query[start:end] @ key.T).toarray(), _text_ids(key_texts), chunk)
    backward = _accuracy(lambda start, end: (key[start:end] @ query.T).toarray(), _text_ids(query_texts), chunk)
    return forward, backward


def read_pairs(paths: Sequence[Path], pivot: str, languages: Sequence[str], min_pairs: int) -> dict[str, list[Pairs]]:
    """The pairs of each file, by its path. UserError as in `pairs_with_pivot`, or if no file has one of the
    `languages`."""
    by_file = {
        str(path): pairs_with_pivot(list(read_nway(path)), pivot, languages, min_pairs, str(path)) for path in paths
    }
    codes = {pairs.language for of_file in by_file.values() for pairs in of_file}
    for wanted in languages:
        if not any(matches(code, wanted) for code in codes):
            raise UserError(f"--languages {wanted}: no file has {min_pairs} pairs of {wanted!r} with {pivot!r}")
    return by_file


def evaluate_retrieval(embedder: Embedder, data: str, pairs: Sequence[Pairs]) -> list[RetrievalRow]:
    """One row for every layer and every language of `pairs`, sorted by layer. `data`: the file's name."""
    different = dict.fromkeys(text for of_language in pairs for text in of_language.pivot_text)
    position = {text: i for i, text in enumerate(different)}
    pivots = embedder.embed(list(position), description="pivot")
    rows = []
    for of_language in pairs:
        pivot = pivots[:, [position[text] for text in of_language.pivot_text]]
        rows += _rows_of_language(embedder, data, of_language, pivot)
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
            projected=embedder.projected,
        )
        for index, layer in enumerate(embedder.layers)
    ]


def _accuracy(scores: Callable[[int, int], Vectors], ids: TextIds, chunk: int) -> float:
    """`scores(start, end)`: those rows of the n x n matrix; `ids` [n]: keys with equal ids are the same answer."""
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
