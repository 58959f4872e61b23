"""Adds up what the lanes report between two log lines, over micro-steps, steps and ranks, and turns sums into
scalars."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from infoxlm_ds import dist

Scalars = dict[str, float]


class Meter:
    """Sums of one interval. All ranks add the same names; `collect` is collective and starts the next interval."""

    def __init__(self) -> None:
        self._clear()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def count_languages(self, languages: dict[str, dict[str, int]]) -> None:
        for task, counts in languages.items():
            self._languages.setdefault(task, Counter()).update(counts)

    def collect(self) -> tuple[Scalars, dict[str, dict[str, int]], float]:
        """Sums over ranks by name, items by task and language, and the seconds since the last call."""
        names = sorted(self._sums)
        sums = torch.tensor([float(self._sums[name]) for name in names], dtype=torch.float64, device=dist.device())
        dist.sum_over_ranks(sums)
        languages: dict[str, Counter[str]] = {}
        for counts in dist.gather_objects(self._languages):
            assert isinstance(counts, dict)
            for task, counter in counts.items():
                languages.setdefault(task, Counter()).update(counter)
        seconds = time.monotonic() - self._since
        self._clear()
        return dict(zip(names, sums.tolist(), strict=True)), {t: dict(c) for t, c in languages.items()}, seconds

    def _clear(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._languages: dict[str, Counter[str]] = {}
        self._since = time.monotonic()


def scalars(sums: Scalars, vocabulary: int) -> Scalars:
    """Means and bounds, in nats, from an interval's sums.

    A loss L of guessing one of C equally likely answers bounds the mutual information from below by log C - L: log V
    for a masked LM,
    log(1 + negatives) for the contrast (InfoXLM, section 3; van den Oord et al., 2018).
    """
    out: Scalars = {}
    for task in ("mmlm", "tlm", "xlco"):
        items = sums.get(f"{task}/items", 0)
        if not items:
            continue
        out[f"{task}/loss"] = sums[f"{task}/loss"] / items
        choices = vocabulary if task != "xlco" else 1 + sums["xlco/negatives"] / items
        out[f"{task}/information_bound"] = math.log(choices) - out[f"{task}/loss"]
    if pairs := sums.get("xlco/items", 0):
        out["xlco/accuracy"] = sums["xlco/hits"] / pairs
        for name in ("positive", "hardest", "negatives"):
            out[f"xlco/{name}"] = sums[f"xlco/{name}"] / pairs
        keys = sums["xlco/negatives"] + sums["xlco/masked"]
        out["xlco/masked_share"] = sums["xlco/masked"] / max(keys, 1)
    return out
