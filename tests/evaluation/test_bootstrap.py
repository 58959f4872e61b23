"""Bootstrap intervals: the binomial's for one language; for a mean, they depend on whether languages share rows."""

from __future__ import annotations

import numpy as np
import pytest

from infoxlm_ds.evaluation import bootstrap
from infoxlm_ds.evaluation.bootstrap import interval, resampled


def test_the_interval_of_one_language_is_the_normal_approximation_of_the_binomial() -> None:
    hits = np.zeros((2, 400), np.float32)
    hits[0, :100] = 1  # accuracy .25
    hits[1, :] = 1
    samples = resampled([hits], [range(400)])
    assert samples.shape == (1, 2, 1000)
    low, high = interval(samples[0, 0])
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert low == pytest.approx(0.25 - error, abs=0.01) and high == pytest.approx(0.25 + error, abs=0.01)
    assert interval(samples[0, 1]) == (1, 1)


def test_shared_rows_move_together_and_others_do_not() -> None:
    """A mean of two languages with equal hits on the same rows is as uncertain as one; on other rows it is less so."""
    hits = np.zeros((1, 200), np.float32)
    hits[0, ::2] = 1
    alone, together, apart = (
        resampled(chosen, rows)[:, 0].mean(0).std()
        for chosen, rows in (
            ([hits], [range(200)]),
            ([hits, hits], [range(200)] * 2),
            ([hits, hits], [range(200), range(200, 400)]),
        )
    )
    assert together == pytest.approx(alone, rel=1e-5)
    assert apart == pytest.approx(alone / 2**0.5, rel=0.15)


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "COUNTS", 10)
    hits = np.ones((1, 3), np.float32)
    assert (resampled([hits], [[0, 5, 90]]) == 1).all()  # also where a sample has none of the rows
