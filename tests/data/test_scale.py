"""The order of data, for more ranks than a test can start."""

from __future__ import annotations

import pytest

from benchmarks.scale import simulate

SIZES = {"mmlm": {"tokens": 512, "overhead": 2}, "tlm": {"tokens": 512, "overhead": 4}, "xlco": {"items": 8}}


@pytest.mark.slow
def test_1024_ranks_take_every_item_of_their_windows_once_in_100_steps() -> None:
    course = simulate(range(1024), 1024, 100, 10**8, SIZES, window_packs=1)
    assert course.items > 1024 * 100 * 16
    assert (course.twice, course.astray, course.missing) == (0, 0, 0)


def test_a_rank_holds_no_more_after_many_steps_of_many_ranks() -> None:
    few = simulate(range(1), 8, 20, 10**7, SIZES, trace=True)
    many = simulate(range(1023, 1024), 1024, 100, 10**9, SIZES, trace=True)
    assert max(many.held) < 1.1 * max(few.held)
