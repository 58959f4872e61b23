"""The queue of negatives (MoCo; InfoXLM, section 3.2), the same on every rank.

Legend: K queue, n new keys, D width, I text ids an item.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infoxlm_ds.losses.contrast import Keys


class KeyQueue:
    """The newest K keys with the text ids of their items and the step each came from.

    It starts empty and is not read before it is full: until then `view()` is None and `filled` says how far it is.
    """

    def __init__(self, size: int, width: int, n_ids: int, device: torch.device) -> None:
        self.vectors = torch.zeros(size, width, device=device)
        self.ids = torch.zeros(size, n_ids, dtype=torch.int64, device=device)
        self.steps = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.pushed = 0  # keys ever pushed; the next goes to row `pushed % K`

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def filled(self) -> float:
        return min(1.0, self.pushed / len(self))

    def view(self) -> Keys | None:
        """All keys, or None as long as some rows are empty."""
        return Keys(self.vectors, self.ids) if self.pushed >= len(self) else None

    def push(self, keys: Keys, step: int) -> None:
        """Overwrite the oldest rows with n new keys, first in first out. n may be above K."""
        vectors, ids = keys
        n = len(vectors)
        kept = slice(max(0, n - len(self)), n)
        rows = (self.pushed + torch.arange(n, device=vectors.device)[kept]) % len(self)
        self.vectors[rows] = vectors[kept].to(self.vectors.dtype)
        self.ids[rows] = ids[kept]
        self.steps[rows] = step
        self.pushed += n

    def mean_age(self, step: int) -> float:
        """Mean number of steps since the keys came in; only of a full queue."""
        return step - float(self.steps.float().mean())

    def state_dict(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors, "ids": self.ids, "steps": self.steps, "pushed": torch.tensor(self.pushed)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("vectors", "ids", "steps"):
            getattr(self, name).copy_(state[name])
        self.pushed = int(state["pushed"])
