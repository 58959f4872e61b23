"""The order of draws is a bijection, treats all packs alike, has the shares asked for, and is the same everywhere."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.data.order import SLOTS, Draw, Plan, SourceSize, Stage, keyed_generator, permuted

SIZES = [SourceSize("mono.a", 40_000, 79), SourceSize("mono.b", 700, 2), SourceSize("mono.c", 9, 1)]


def by_size(sources: list[SourceSize], alpha: float) -> list[Stage]:
    return [Stage(0, np.array([source.items for source in sources]) ** alpha)]


source_lists = st.lists(st.integers(1, 3000), min_size=1, max_size=5).map(
    lambda items: [SourceSize(f"mono.{i}", n, -(-n // 512)) for i, n in enumerate(items)]
)


@given(size=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_the_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_each_key_gives_another_permutation_and_each_place_about_every_value() -> None:
    orders = np.array([[permuted(i, 12, key) for i in range(12)] for key in range(2400)])
    assert len(np.unique(orders, axis=0)) > 2390
    seen = np.stack([(orders == value).sum(0) for value in range(12)])  # [value, place], 200 expected
    assert abs(seen - 200).max() < 75  # five standard deviations


@given(sources=source_lists, alpha=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_every_pack_comes_once_a_source_epoch(sources: list[SourceSize], alpha: float, seed: int) -> None:
    plan = Plan(sources, by_size(sources, alpha), seed, "mmlm")
    draws = [plan.draw(t) for t in range(400)]
    for number, source in enumerate(sources):
        packs = [draw.pack for draw in draws if draw.source == number]
        epochs = [draw.epoch for draw in draws if draw.source == number]
        assert epochs == [i // source.packs for i in range(len(packs))]
        for start in range(0, len(packs) - source.packs + 1, source.packs):
            assert sorted(packs[start : start + source.packs]) == list(range(source.packs))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_items_of_sources_are_read_in_shares_of_p_to_the_alpha(alpha: float) -> None:
    plan = Plan(SIZES, by_size(SIZES, alpha), 3, "xlco")
    drawn = np.bincount([plan.draw(t).source for t in range(SLOTS)], minlength=len(SIZES))
    assert drawn.sum() == SLOTS
    items, packs = np.array([s.items for s in SIZES]), np.array([s.packs for s in SIZES])
    read = drawn * items / packs  # a pass over a source reads all its items in `packs` draws
    wanted = items**alpha / (items**alpha).sum()
    slot = items / packs / (drawn * items / packs).sum()  # the change by one slot
    assert (abs(read / read.sum() - wanted) <= 3 * slot.max()).all()


def test_a_source_of_any_size_is_drawn() -> None:
    sources = [SourceSize("mono.a", 10**12, 1_953_125_000), SourceSize("mono.b", 1, 1)]
    plan = Plan(sources, by_size(sources, 1.0), 1, "mmlm")
    assert {plan.draw(t).source for t in range(SLOTS)} == {0, 1}


@given(lanes=st.integers(1, 6), packs=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_windows_of_the_lanes_are_the_draws_in_turn(lanes: int, packs: int) -> None:
    plan = Plan(SIZES, by_size(SIZES, 0.5), 1, "tlm")
    windows = [plan.window(lane, k, lanes, packs) for k in range(3) for lane in range(lanes)]
    assert [draw for window in windows for draw in window] == [plan.draw(t) for t in range(3 * lanes * packs)]


def test_a_far_draw_does_not_depend_on_what_was_drawn_before() -> None:
    used = Plan(SIZES, by_size(SIZES, 0.5), 1, "tlm")
    for t in range(50):
        used.draw(t)
    assert used.draw(10**15) == Plan(SIZES, by_size(SIZES, 0.5), 1, "tlm").draw(10**15)


def test_seed_and_stream_each_give_another_order() -> None:
    orders = [
        [Plan(SIZES, by_size(SIZES, 0.5), seed, stream).draw(t) for t in range(60)]
        for seed in (1, 2)
        for stream in ("mmlm", "tlm")
    ]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])


def test_the_order_is_the_same_in_another_process() -> None:
    script = """
import numpy as np
from infoxlm_ds.data.order import Plan, SourceSize, Stage, keyed_generator
sizes = [SourceSize("mono.a", 40_000, 79), SourceSize("mono.b", 700, 2), SourceSize("mono.c", 9, 1)]
plan = Plan(sizes, [Stage(0, np.array([40_000, 700, 9]) ** 0.7)], 5, "mmlm")
print([tuple(plan.draw(t)) for t in range(40)], keyed_generator(5, "mask", 3, 7).integers(2**62))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    )
    plan = Plan(SIZES, by_size(SIZES, 0.7), 5, "mmlm")
    here = f"{[tuple(plan.draw(t)) for t in range(40)]} {keyed_generator(5, 'mask', 3, 7).integers(2**62)}"
    assert done.stdout.strip() == here


def test_parts_of_a_key_do_not_run_together() -> None:
    assert keyed_generator(1, 23).integers(2**62) != keyed_generator(12, 3).integers(2**62)
    assert isinstance(Plan(SIZES, by_size(SIZES, 0.7), 1, "mmlm").draw(0), Draw)


FIRST = [Stage(0, np.array([5.0, 1.0, 0.0])), Stage(70_123, np.array([1.0, 2.0, 3.0]))]


def test_a_stage_goes_on_with_the_passes_of_the_one_before() -> None:
    first, plan = Plan(SIZES, FIRST[:1], 1, "mmlm"), Plan(SIZES, [*FIRST, Stage(70_200, np.eye(3)[0])], 1, "mmlm")
    draws = [plan.draw(t) for t in range(71_000)]
    assert draws[:70_123] == [first.draw(t) for t in range(70_123)]
    for number, source in enumerate(SIZES):
        seen = [draw.epoch * source.packs for draw in draws if draw.source == number]
        assert seen == [i // source.packs * source.packs for i in range(len(seen))]
        packs = [draw.pack for draw in draws if draw.source == number]
        for start in range(0, len(packs) - source.packs + 1, source.packs):
            assert sorted(packs[start : start + source.packs]) == list(range(source.packs))
    assert {draw.source for draw in draws[:70_123]} == {0, 1} and {draw.source for draw in draws[70_200:]} == {0}
    assert {draw.source for draw in draws[70_123:70_200]} == {0, 1, 2}


def test_each_stage_has_its_shares() -> None:
    plan = Plan(SIZES, FIRST, 3, "xlco")
    items, packs = np.array([s.items for s in SIZES]), np.array([s.packs for s in SIZES])
    for stage, start in zip(FIRST, (0, 70_123), strict=True):
        drawn = np.bincount([plan.draw(start + t).source for t in range(SLOTS)], minlength=len(SIZES))
        exact = stage.shares * packs / items / (stage.shares * packs / items).sum() * SLOTS
        assert (abs(drawn - exact) <= 3).all()
