"""Nearest neighbours and margin scores equal float64 oracles, whatever the chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.evaluation.neighbours import NEIGHBOURS, SCORES, Score, nearest, rescored


def _unit(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 7, 4096]), st.integers(0, 99))
def test_neighbours_are_those_of_the_whole_matrix(n: int, m: int, k: int, chunk: int, seed: int) -> None:
    query, key = _unit(n, seed), _unit(m, seed + 100)
    values, places = nearest(query, key, k, chunk=chunk)
    scores = query.astype(np.float64) @ key.astype(np.float64).T
    assert values.shape == places.shape == (n, min(k, m))
    np.testing.assert_allclose(values, np.sort(scores, axis=1)[:, ::-1][:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(scores, places, axis=1), values, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in places)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_the_papers(score: Score) -> None:
    """By hand: two texts on each side, one neighbour, so the means are the highest cosine of a row or column."""
    cosine = np.array([[0.9, 0.6], [0.8, 0.4]], np.float32)
    query, key = cosine.max(axis=1, keepdims=True), cosine.max(axis=0, keepdims=True)
    expected = {
        "cosine": [[0.9, 0.6], [0.8, 0.4]],
        "ratio": [[0.9 / 0.9, 0.6 / 0.75], [0.8 / 0.85, 0.4 / 0.7]],
        "distance": [[0.9 - 0.9, 0.6 - 0.75], [0.8 - 0.85, 0.4 - 0.7]],
        "csls": [[1.8 - 1.8, 1.2 - 1.5], [1.6 - 1.7, 0.8 - 1.4]],
    }
    np.testing.assert_allclose(rescored(score, cosine, query, key), expected[score], atol=1e-6)
    assert NEIGHBOURS["ratio"] == 4 and NEIGHBOURS["csls"] == 10
