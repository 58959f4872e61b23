"""The queue is first in, first out for any batch size. It is not read before it is full. It is the
same with any sharding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as torch_dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.losses.queue import KeyQueue
from tests.distributed.ranks import run_ranks

CPU = torch.device("cpu")
BATCHES = [4, 0, 30, 1, 7, 7]


def _numbered(first: int, count: int) -> Keys:
    """Keys in which every value is the key's number."""
    numbers = torch.arange(first, first + count)
    return Keys(numbers[:, None].float().expand(count, 2), numbers[:, None])


def _filled(size: int, batches: list[int], sharded: bool = False) -> KeyQueue:
    queue = KeyQueue(size, 2, 1, CPU, sharded)
    for step, n in enumerate(batches):
        queue.push(_numbered(queue.pushed, n), step)
    return queue


def _held(queue: KeyQueue) -> list[tuple[int, int]]:
    assert queue.vectors[:, 0].tolist() == queue.ids[:, 0].tolist()
    return sorted(zip(queue.ids[:, 0].tolist(), queue.steps.tolist(), strict=True))


@given(st.integers(1, 9), st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_the_queue_holds_the_newest_keys_with_their_ids_and_steps(size: int, batches: list[int]) -> None:
    queue = _filled(size, batches)
    everything = [(number, step) for step, n in enumerate(batches) for number in [0] * n]
    everything = [(number, step) for number, (_, step) in enumerate(everything)]
    assert queue.filled == min(1.0, len(everything) / size)
    assert (queue.view() is not None) == (len(everything) >= size)
    if queue.view() is not None:
        assert _held(queue) == everything[-size:]


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 9))
def test_another_size_takes_over_the_newest_keys_and_fills_again(
    old: int, new: int, batches: list[int], more: int
) -> None:
    before, queue = _filled(old, batches), KeyQueue(new, 2, 1, CPU)
    queue.load_state_dicts([before.state_dict()])
    kept = min(old, new, before.pushed)
    assert queue.filled == kept / new
    queue.push(_numbered(queue.pushed, more), 99)
    assert queue.filled == min(1.0, (kept + more) / new)
    if queue.view() is not None:
        assert [number for number, _ in _held(queue)] == list(range(before.pushed + more - new, before.pushed + more))


def test_a_queue_saved_while_it_fills_again_goes_on_filling() -> None:
    """Its first rows were never written after it was made larger."""
    larger, again = KeyQueue(12, 2, 1, CPU), KeyQueue(12, 2, 1, CPU)
    larger.load_state_dicts([_filled(5, [20]).state_dict()])
    larger.push(_numbered(20, 4), 1)
    again.load_state_dicts([larger.state_dict()])
    assert larger.filled == again.filled == 9 / 12 and again.view() is None
    again.push(_numbered(24, 3), 2)
    assert [number for number, _ in _held(again)] == list(range(15, 27))


def test_state_comes_back_as_it_was() -> None:
    queue, other = KeyQueue(5, 3, 2, CPU), KeyQueue(5, 3, 2, CPU)
    queue.push(Keys(torch.randn(7, 3), torch.randint(9, (7, 2))), 4)
    other.load_state_dicts([queue.state_dict()])
    for name, value in queue.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("column", ["vectors", "ids", "steps"])
def test_the_checksum_sees_one_bit_and_two_rows_that_changed_places(column: str) -> None:
    queue = _filled(40, BATCHES)
    before = queue.checksum()
    assert _filled(40, BATCHES).checksum() == before
    values: Tensor = getattr(queue, column)
    kept = values[3].clone()
    values[3] = values[3].nextafter(torch.tensor(0.0)) if column == "vectors" else values[3] ^ 1
    assert queue.checksum() != before
    values[3] = kept
    assert queue.checksum() == before
    queue.vectors[[0, 20]], queue.ids[[0, 20]] = queue.vectors[[20, 0]], queue.ids[[20, 0]]
    assert queue.checksum() != before


def _on_ranks(rank: int, world: int) -> tuple[list[tuple[int, int]], int, float, dict[str, Tensor]]:
    torch_dist.init_process_group("gloo")
    queue = _filled(23, BATCHES, sharded=True)
    queue.verify()
    return _held(queue), queue.checksum(), queue.mean_age(9), queue.state_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_a_sharded_queue_is_the_replicated_one_in_parts(world: int) -> None:
    whole = _filled(23, BATCHES)
    results = run_ranks(_on_ranks, world)
    assert sorted(key for held, *_ in results for key in held) == _held(whole)
    assert max(len(held) for held, *_ in results) == -(-23 // world)
    for _, checksum, age, _ in results:
        assert (checksum, age) == (whole.checksum(), whole.mean_age(9))
    together = KeyQueue(23, 2, 1, CPU)
    together.load_state_dicts([state for *_, state in results])
    assert torch.equal(together.vectors, whole.vectors) and torch.equal(together.steps, whole.steps)


def _diverged(rank: int, world: int) -> str:
    torch_dist.init_process_group("gloo")
    queue = _filled(23, BATCHES)
    queue.verify()
    queue.vectors[5] += rank
    with pytest.raises(RuntimeError) as caught:
        queue.verify()
    return str(caught.value)


def test_queues_that_differ_between_ranks_are_found() -> None:
    for message in run_ranks(_diverged, 2):
        assert "queues of the ranks differ" in message
