"""The queue of negatives (MoCo; InfoXLM, section 3.2). Each rank holds the whole queue, or its share if it is sharded.

Vectors lie on the device. Text ids and step numbers lie on the host, where they are compared.

Legend: K queue, n new keys, D width, I text ids of an item.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.losses.keys import Keys

CHUNK = 8192  # rows that a checksum reads at once
MIX = 0x1E3779B97F4A7C15  # odd, so multiplying by it loses no bit


class KeyQueue:
    """The newest K keys, with the text ids of their items and the step that made them.

    Keys are numbered from the first push on. Key number p lies in row p mod K. In a sharded queue, rank r of W holds
    the rows r, r + W, r + 2 W, ... The queue starts empty and is not read before it is full: until then `view()` is
    None, and `filled` is the share that is filled.
    """

    def __init__(self, size: int, width: int, n_ids: int, device: torch.device, sharded: bool = False) -> None:
        self.size, self.sharded = size, sharded and dist.world_size() > 1
        self._first, self._every = (dist.rank(), dist.world_size()) if self.sharded else (0, 1)
        held = len(range(self._first, size, self._every))
        self.vectors = torch.zeros(held, width, device=device)
        self.ids = torch.zeros(held, n_ids, dtype=torch.int64)
        self.steps = torch.full((held,), -1, dtype=torch.int64)
        self.start = 0  # number of the oldest key that was ever kept; above 0 after a change of size
        self.pushed = 0

    def __len__(self) -> int:
        return self.size

    @property
    def filled(self) -> float:
        """The share of the rows that hold a key, from 0 to 1."""
        return min(1.0, (self.pushed - self.start) / self.size)

    def view(self) -> Keys | None:
        """All keys, or this rank's if the queue is sharded. None while some rows are empty."""
        return Keys(self.vectors, self.ids, self.sharded) if self.filled == 1.0 else None

    def push(self, keys: Keys, step: int) -> None:
        """Overwrite the oldest rows with n new keys, first in, first out. n may be above K. Every rank
        gives all n keys."""
        numbers = torch.arange(self.pushed, self.pushed + len(keys.ids))
        self._put(numbers, keys.vectors, keys.ids, torch.full_like(numbers, step))
        self.pushed += len(numbers)

    def _put(self, numbers: Tensor, vectors: Tensor, ids: Tensor, steps: Tensor) -> None:
        """Store keys, ordered by rising number: of the newest K, those whose rows this rank holds."""
        numbers, vectors, ids, steps = (x[-self.size :] for x in (numbers, vectors, ids, steps))
        held = (numbers % self.size % self._every == self._first).nonzero()[:, 0]
        rows = numbers[held] % self.size // self._every
        self.ids[rows], self.steps[rows] = ids[held], steps[held]
        there, chosen = (dist.to_device(x, to) for x, to in ((rows, self.vectors.device), (held, vectors.device)))
        self.vectors[there] = vectors[chosen].to(self.vectors)

    def mean_age(self, step: int) -> float:
        """Mean number of steps since the keys came in. The queue must be full. Collective if the queue is sharded."""
        total = self.steps.sum()
        return step - int(dist.sum_over_ranks(total) if self.sharded else total) / self.size

    def checksum(self) -> int:
        """A number of 64 bits that depends on every bit of every row and on the row's place, but not on how the queue
        is sharded. Collective if it is sharded."""
        device, width = self.vectors.device, self.vectors.shape[1]
        column = 2 * torch.arange(width + self.ids.shape[1] + 1) + 1
        others = (torch.cat([self.ids, self.steps[:, None]], 1) * column[width:] * MIX).sum(1)
        others, column = dist.to_device(others, device), dist.to_device(column[:width], device)
        total = torch.zeros((), dtype=torch.int64, device=device)
        for start in range(0, len(self.ids), CHUNK):
            part = slice(start, start + CHUNK)
            bits = (self.vectors[part].view(torch.int32).long() * column * MIX).sum(1) + others[part]
            row = (torch.arange(start, start + len(bits), device=device) * self._every + self._first + 1) * MIX
            mixed = bits ^ row
            total += ((mixed ^ (mixed >> 29)) * MIX).sum()
        return int(dist.sum_over_ranks(total) if self.sharded else total)

    def verify(self) -> None:
        """RuntimeError unless all ranks hold the same queue. Collective."""
        sums = dist.gather_objects((self.pushed, self.checksum()))
        if len(set(sums)) > 1:
            raise RuntimeError(f"the queues of the ranks differ: (keys pushed, checksum) by rank is {sums}")

    def state_dict(self) -> dict[str, Tensor]:
        """The rows that this rank holds, and the numbers of their keys. A queue with another layout finds
        its rows by them."""
        counts = {name: torch.tensor(getattr(self, name)) for name in ("size", "start", "pushed")}
        rows = torch.arange(len(self.ids)) * self._every + self._first
        numbers = self.pushed - 1 - (self.pushed - 1 - rows) % self.size  # the newest key of each row
        return counts | {"numbers": numbers, "vectors": self.vectors, "ids": self.ids, "steps": self.steps}

    def load_state_dicts(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Take over a queue of any size and sharding, in the parts in which it was saved. A smaller queue gives all its
        keys, and this one goes on filling."""
        for part in parts:
            size, start, self.pushed = (int(part[name]) for name in ("size", "start", "pushed"))
            self.start = max(start, self.pushed - size) if size < self.size else start
            numbers, order = part["numbers"].sort()
            kept = order[numbers >= self.pushed - self.size]  # each part holds both newer and older keys
            self._put(*(part[name][kept] for name in ("numbers", "vectors", "ids", "steps")))
