"""Adds up what the lanes report between two log lines, over micro-steps, steps and ranks, and computes scalars from the
sums."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds import dist

Scalars = dict[str, float]


class Interval(NamedTuple):
    """The sums of one interval, over all ranks. `sums`: by name; `languages`: number of items by task and language;
    `pairs`: mean loss and accuracy of the contrast by language pair; `seconds`: its length."""

    sums: Scalars
    languages: dict[str, dict[str, int]]
    pairs: dict[str, dict[str, float]]
    seconds: float


class Meter:
    """Sums of one interval on this rank. All ranks must add the same names."""

    def __init__(self) -> None:
        self._clear()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def count_languages(self, names: dict[str, np.ndarray]) -> None:
        """`names`: for each task, the language or pair of languages of each item."""
        for task, of_task in names.items():
            self._languages.setdefault(task, Counter()).update(of_task.ravel().tolist())

    def add_pairs(self, names: np.ndarray, columns: Tensor) -> None:
        """`columns`: loss and hit of the contrast's rows, [2, R]; `names`: the language pairs of their items, [b, 1 or
        2]. R is b, or 2 b if the rows of a second direction follow."""
        self._pairs.append((names, columns.detach()))

    def collect(self) -> Interval:
        """The sums over all ranks. Starts the next interval. Collective."""
        names = sorted(self._sums)
        sums = torch.tensor([float(self._sums[name]) for name in names], dtype=torch.float64, device=dist.device())
        dist.sum_over_ranks(sums)
        languages: dict[str, Counter[str]] = {}
        pairs: dict[str, np.ndarray] = {}
        for counts, of_rank in dist.gather_objects((self._languages, _by_pair(self._pairs))):
            for task, counter in counts.items():
                languages.setdefault(task, Counter()).update(counter)
            for name, values in of_rank.items():
                pairs[name] = pairs.get(name, 0) + values
        seconds = time.monotonic() - self._since
        self._clear()
        return Interval(
            dict(zip(names, sums.tolist(), strict=True)),
            {task: dict(counter) for task, counter in languages.items()},
            {name: {"loss": loss / rows, "accuracy": hits / rows} for name, (rows, loss, hits) in pairs.items()},
            seconds,
        )

    def _clear(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._languages: dict[str, Counter[str]] = {}
        self._pairs: list[tuple[np.ndarray, Tensor]] = []
        self._since = time.monotonic()


def _by_pair(parts: list[tuple[np.ndarray, Tensor]]) -> dict[str, np.ndarray]:
    """Number of rows, sum of losses and number of hits for each language pair."""
    sums: dict[str, np.ndarray] = {}
    for names, columns in parts:
        loss, hits = columns.double().cpu().numpy()
        rows = np.resize(names, (len(loss), names.shape[1]))  # the second direction's rows repeat the items
        for name in np.unique(rows):
            chosen = (rows == name).any(1)
            sums[name] = sums.get(name, 0) + np.array([chosen.sum(), loss[chosen].sum(), hits[chosen].sum()])
    return sums


def scalars(sums: Scalars, vocabulary: int) -> Scalars:
    """Means and bounds, in nats, from an interval's sums.

    If a loss L measures the choice among C equally likely answers, the mutual information is at least log C - L. C is V
    for a masked LM and 1 + negatives for the contrast (InfoXLM, section 3; van den Oord et al., 2018). The contrast has
    no bound if negatives were left out by their scores, or if there were further positives.
    """
    out: Scalars = {}
    for task in ("mmlm", "tlm", "xlco"):
        items = sums.get(f"{task}/items", 0)
        if not items:
            continue
        out[f"{task}/loss"] = sums[f"{task}/loss"] / items
        if task == "xlco" and (sums["xlco/dropped"] or sums["xlco/positives"]):
            continue  # no bound
        log_choices = sums["xlco/log_choices"] / items if task == "xlco" else math.log(vocabulary)
        out[f"{task}/information_bound"] = log_choices - out[f"{task}/loss"]
    if rows := sums.get("xlco/items", 0):
        out["xlco/accuracy"] = sums["xlco/hits"] / rows
        out["xlco/rank"] = 1 + sums["xlco/above"] / rows
        out["xlco/gradient_share"] = sums["xlco/repelled"] / rows
        for name in ("positive", "hardest", "negatives", "positives"):
            out[f"xlco/{name}"] = sums[f"xlco/{name}"] / rows
        keys = sum(sums[f"xlco/{name}"] for name in ("negatives", "masked", "dropped"))
        for name in ("masked", "dropped"):
            out[f"xlco/{name}_share"] = sums[f"xlco/{name}"] / max(keys, 1)
    return out
