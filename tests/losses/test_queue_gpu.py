"""A queue on a GPU holds what one on a CPU holds, bit by bit."""

from __future__ import annotations

import pytest
import torch

from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.losses.queue import KeyQueue

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pushes_checksum_and_state_equal_those_on_a_cpu(device: torch.device, dtype: torch.dtype) -> None:
    """A push may be empty, wrap around, or be larger than the queue."""
    generator, host = torch.Generator().manual_seed(0), torch.device("cpu")
    ours, theirs, again = KeyQueue(9_000, 24, 3, device), KeyQueue(9_000, 24, 3, host), KeyQueue(9_000, 24, 3, device)
    for step, count in enumerate((2_000, 0, 5_000, 4_000, 10_000, 17)):
        vectors, ids = torch.randn(count, 24, generator=generator).to(dtype), torch.randint(2**60, (count, 3))
        for queue in (ours, theirs):
            queue.push(Keys(vectors.to(queue.vectors.device), ids), step)
        assert ours.checksum() == theirs.checksum() and ours.filled == theirs.filled
    assert torch.equal(ours.vectors.cpu(), theirs.vectors) and torch.equal(ours.ids, theirs.ids)
    again.load_state_dicts([{name: x.cpu() for name, x in ours.state_dict().items()}])
    assert again.checksum() == theirs.checksum() and again.mean_age(7) == theirs.mean_age(7)
