"""Accuracy@1 equals a brute-force float64 oracle. Ties and equal texts follow the rules."""

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.evaluation.approximate import nearest_by_cells
from infoxlm_ds.evaluation.neighbours import SCORES, Score
from infoxlm_ds.evaluation.results import evaluate_retrieval
from infoxlm_ds.evaluation.retrieval import retrieval_accuracy, trigram_accuracy
from infoxlm_ds.evaluation.text import Pairs
from infoxlm_ds.model.sentence_vector import View

Vectors = npt.NDArray[np.float32]


def _unit(vectors: npt.NDArray[np.float64]) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _brute_force(query: Vectors, key: Vectors, texts: list[str]) -> float:
    """Row by row in float64: a hit if the best key has the right text and no other text scores as high."""
    hits = 0
    for row, vector in enumerate(query.astype(np.float64)):
        scores = [float(vector @ other) for other in key.astype(np.float64)]
        best = {texts[i] for i, score in enumerate(scores) if score == max(scores)}
        hits += best == {texts[row]}
    return hits / len(query)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([(1, 7), (7, 1), (1024, 16384)]))
def test_accuracy_equals_brute_force_for_every_chunk(n: int, seed: int, chunks: tuple[int, int]) -> None:
    random = np.random.default_rng(seed)
    texts = [f"text {i}" for i in random.integers(0, n, n)]  # some rows share a text and so a vector
    vector_of = {text: random.normal(size=8) for text in texts}
    key = _unit(np.stack([vector_of[text] for text in texts]))
    query = _unit(key + random.normal(size=(n, 8)) * 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infoxlm_ds.evaluation.retrieval.QUERIES", chunks[0])
        patch.setattr("infoxlm_ds.evaluation.retrieval.KEYS", chunks[1])
        assert retrieval_accuracy(query, key, texts) == pytest.approx(_brute_force(query, key, texts))


@pytest.mark.parametrize(("score", "k"), [("ratio", 4), ("distance", 4), ("csls", 10)])
def test_scores_by_margin_equal_their_definitions(score: Score, k: int) -> None:
    random = np.random.default_rng(0)
    states = random.normal(size=(200, 12))
    states[:40] *= 0.3  # the shift makes them near to everything
    query, key = _unit(states + random.normal(size=(200, 12)) * 0.6 + 0.4), _unit(states + 0.4)
    cosine = query.astype(np.float64) @ key.T.astype(np.float64)
    around_query, around_key = (np.sort(side, axis=1)[:, -k:].mean(1) for side in (cosine, cosine.T))
    hits = []
    for row in range(200):
        means = (around_query[row] + around_key) / 2
        scores = {"ratio": cosine[row] / means, "distance": cosine[row] - means, "csls": 2 * (cosine[row] - means)}
        hits.append(int(scores[score].argmax()) == row)
    assert retrieval_accuracy(query, key, score=score) == np.mean(hits)
    assert 0 < np.mean(hits) < 1 and np.mean(hits) != retrieval_accuracy(query, key)  # otherwise little is shown


def test_above_a_million_pairs_candidates_come_from_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    texts = [f"text {i}" for i in random.integers(0, 300, 400)]
    key = _unit(random.normal(size=(400, 16)))
    query = _unit(key + random.normal(size=(400, 16)) * 0.3)
    exact = {score: retrieval_accuracy(query, key, texts, score) for score in SCORES}
    monkeypatch.setattr("infoxlm_ds.evaluation.retrieval.MANY", 399)
    for score in SCORES:
        assert retrieval_accuracy(query, key, texts, score) == pytest.approx(exact[score], abs=0.01)
        assert 0 < exact[score] < 1


def test_cosines_of_many_pairs_need_one_approximate_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of neighbours need a search in the other direction too, which takes as long."""
    pytest.importorskip("faiss", reason="faiss is not installed")
    vectors, searched = _unit(np.random.default_rng(0).normal(size=(200, 8))), list[str]()

    def counted(*arguments: Any, what: str = "") -> tuple[Any, Any]:
        searched.append(what)
        return nearest_by_cells(*arguments)

    monkeypatch.setattr("infoxlm_ds.evaluation.retrieval.MANY", 199)
    monkeypatch.setattr("infoxlm_ds.evaluation.retrieval.nearest_by_cells", counted)
    assert retrieval_accuracy(vectors, vectors) == 1 and len(searched) == 1
    assert retrieval_accuracy(vectors, vectors, score="distance") == 1 and len(searched) == 3


def test_a_hit_on_an_equal_text_counts_and_on_an_equal_vector_does_not() -> None:
    query, key = _unit(np.eye(3)), _unit(np.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]))
    query[1] = query[0]
    assert retrieval_accuracy(query, key, ["save", "save", "open"]) == 1
    assert retrieval_accuracy(query, key, ["save", "store", "open"]) == pytest.approx(1 / 3)
    assert retrieval_accuracy(query, key) == pytest.approx(1 / 3)


def test_a_collapsed_encoder_scores_zero() -> None:
    one_point = _unit(np.ones((5, 4)))
    assert retrieval_accuracy(one_point, one_point) == 0


def _tfidf_brute_force(query: list[str], key: list[str]) -> float:
    """Trigram TF-IDF with smoothed idf in plain Python; both sides are the documents."""
    grams = {text: Counter(text.lower()[i : i + 3] for i in range(len(text) - 2)) for text in query + key}
    documents = Counter(gram for text in query + key for gram in grams[text])
    idf = {gram: math.log((1 + 2 * len(query)) / (1 + count)) + 1 for gram, count in documents.items()}

    def cosine(a: str, b: str) -> float:
        norms = [math.sqrt(sum((count * idf[gram]) ** 2 for gram, count in grams[text].items())) for text in (a, b)]
        return sum(count * grams[b][gram] * idf[gram] ** 2 for gram, count in grams[a].items()) / math.prod(norms)

    hits = 0
    for row, text in enumerate(query):
        scores = [cosine(text, other) for other in key]
        hits += all(scores[row] > score for other, score in enumerate(scores) if other != row)
    return hits / len(query)


def test_trigram_baseline_equals_tfidf_by_hand() -> None:
    english = ["Restart Home Assistant", "The ZHA network", "Open the door", "Set the temperature", "Never", "Home"]
    german = [
        "Home Assistant neu starten",
        "Das ZHA-Netzwerk",
        "Öffne die Tür",
        "Temperatur einstellen",
        "Nie mehr",
        "Zuhause",
    ]
    expected = (_tfidf_brute_force(english, german), _tfidf_brute_force(german, english))
    assert trigram_accuracy(english, german) == expected
    assert min(expected) > 0 and max(expected) < 1  # otherwise the comparison would show little


class _Lookup:
    """Looks up vectors by sentence, so each accuracy is known beforehand."""

    def __init__(self, layers: dict[int, dict[str, list[float]]]) -> None:
        self.views = [View(layer, "mean") for layer in layers]
        self.projected = False
        self._tables = layers

    def embed(self, sentences: list[str], *, description: str = "") -> Vectors:
        tables = self._tables.values()
        return _unit(np.array([[table[sentence] for sentence in sentences] for table in tables]))


def test_rows_report_each_layer_both_ways_beside_one_baseline() -> None:
    aligned = {"door": [1.0, 0.0], "lamp": [0.0, 1.0], "Tür": [1.0, 0.1], "Lampe": [0.1, 1.0]}
    drawn_to_door = aligned | {"Lampe": [0.8, 0.7]}  # both keys lie nearer to "door", yet "lamp" still finds "Lampe"
    pairs = [Pairs("de", ["lamp", "door"], ["Lampe", "Tür"], False, "LATIN", [0, 1])]
    rows, means = evaluate_retrieval(_Lookup({1: aligned, 4: drawn_to_door}), "rows.jsonl", pairs)
    assert [(row.layer, row.forward, row.backward) for row in rows] == [(1, 1.0, 1.0), (4, 1.0, 0.5)]
    assert {(row.data, row.lang, row.n, row.chance) for row in rows} == {("rows.jsonl", "de", 2, 0.5)}
    assert [(mean.group, mean.layer, mean.backward) for mean in means if mean.group != "all"] == [
        *(("script LATIN", 1, 1.0), ("family Germanic", 1, 1.0), ("script LATIN", 4, 0.5), ("family Germanic", 4, 0.5))
    ]
    trigram = trigram_accuracy(["lamp", "door"], ["Lampe", "Tür"])
    assert {(row.trigram_forward, row.trigram_backward) for row in rows} == {trigram}


def test_texts_without_a_trigram_have_chance_as_their_baseline() -> None:
    assert trigram_accuracy(["a", "b"], ["c", "d"]) == (0.5, 0.5)
