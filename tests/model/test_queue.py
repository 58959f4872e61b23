"""The queue is first in first out for any batch size, and is not read before it is full."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.model.queue import KeyQueue


@given(st.integers(1, 9), st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_the_queue_holds_the_newest_keys_with_their_ids_and_steps(size: int, batches: list[int]) -> None:
    queue = KeyQueue(size, 2, 1, torch.device("cpu"))
    everything: list[tuple[int, int]] = []
    for step, n in enumerate(batches):
        numbers = torch.arange(len(everything), len(everything) + n)
        queue.push(Keys(numbers[:, None].float().expand(n, 2), numbers[:, None]), step)
        everything += [(int(number), step) for number in numbers]
        newest = everything[-size:]
        assert queue.filled == min(1.0, len(everything) / size)
        assert (queue.view() is not None) == (len(everything) >= size)
        if queue.view() is not None:
            held = sorted(zip(queue.ids[:, 0].tolist(), queue.steps.tolist(), strict=True))
            assert held == newest
            assert queue.vectors[:, 0].tolist() == queue.ids[:, 0].tolist()


def test_state_comes_back_as_it_was() -> None:
    queue, other = KeyQueue(5, 3, 2, torch.device("cpu")), KeyQueue(5, 3, 2, torch.device("cpu"))
    queue.push(Keys(torch.randn(7, 3), torch.randint(9, (7, 2))), 4)
    other.load_state_dict(queue.state_dict())
    for name, value in queue.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
