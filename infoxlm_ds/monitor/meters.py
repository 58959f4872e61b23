"""Adds up what the lanes report between two log lines, over micro-steps, steps and ranks, and computes scalars from the
sums."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds import dist

Scalars = dict[str, float]
Moment = float | torch.cuda.Event


class Interval(NamedTuple):
    """The sums of one interval, over all ranks. `sums`: by name; `languages`: number of items by task and language;
    `rows`: for each task and language or pair of languages, the number of rows, the sum of their losses and, of the
    contrast, the number of hits; `work`: seconds of each rank's forward passes; `seconds`: its length."""

    sums: Scalars
    languages: dict[str, dict[str, int]]
    rows: dict[str, dict[str, np.ndarray]]
    work: list[float]
    seconds: float

    def means(self, task: str) -> dict[str, dict[str, float]]:
        """Mean loss and, of the contrast, accuracy of each language or pair of languages that had a row. Without a
        masked piece, an item has none."""
        names = ("loss", "accuracy")
        return {
            name: dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=False))
            for name, sums in self.rows.get(task, {}).items()
            if sums[0]
        }


class Meter:
    """Sums of one interval on this rank. All ranks must add the same names."""

    def __init__(self) -> None:
        self._clear()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values to the sums of their names."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value

    @contextmanager
    def working(self) -> Iterator[None]:
        """Time a forward pass, on the device that runs it. Nothing waits for the device before `collect`."""
        begun = _moment()
        yield
        self._work.append((begun, _moment()))

    def count_languages(self, names: dict[str, np.ndarray]) -> None:
        """`names`: for each task, the language or pair of languages of each item."""
        for task, of_task in names.items():
            self._languages.setdefault(task, Counter()).update(of_task.ravel().tolist())

    def add_rows(self, task: str, names: np.ndarray, columns: Tensor, items: Tensor | None = None) -> None:
        """`columns`: losses of a task's rows and, of the contrast, whether they hit, [1 or 2, R]; `names`: the language
        or pairs of languages of their items, [b, 1 or 2]; `items` [R] int64: each row's item. None: R is b, or 2 b if
        the rows of a second direction follow. Nothing waits for the device before `collect`."""
        self._rows.append((task, names, columns.detach(), items))

    def collect(self) -> Interval:
        """The sums over all ranks. Starts the next interval. Collective."""
        names = sorted(self._sums)
        sums = torch.tensor([float(self._sums[name]) for name in names], dtype=torch.float64, device=dist.device())
        dist.sum_over_ranks(sums)
        languages: dict[str, Counter[str]] = {}
        rows: dict[str, dict[str, np.ndarray]] = {}
        own = sum(_seconds_between(*moments) for moments in self._work)
        work = []
        for counts, of_rank, worked in dist.gather_objects((self._languages, _by_name(self._rows), own)):
            work.append(worked)
            for task, counter in counts.items():
                languages.setdefault(task, Counter()).update(counter)
            for task, of_task in of_rank.items():
                _add(rows.setdefault(task, {}), of_task)
        seconds = time.monotonic() - self._since
        self._clear()
        return Interval(
            dict(zip(names, sums.tolist(), strict=True)),
            {task: dict(counter) for task, counter in languages.items()},
            rows,
            work,
            seconds,
        )

    def _clear(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._languages: dict[str, Counter[str]] = {}
        self._rows: list[tuple[str, np.ndarray, Tensor, Tensor | None]] = []
        self._work: list[tuple[Moment, Moment]] = []
        self._since = time.monotonic()


def _moment() -> Moment:
    if dist.device().type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(begun: Moment, ended: Moment) -> float:
    """The device must have reached both."""
    if isinstance(begun, float):
        assert isinstance(ended, float)
        return ended - begun
    assert isinstance(ended, torch.cuda.Event)
    return begun.elapsed_time(ended) / 1000


def _by_name(parts: list[tuple[str, np.ndarray, Tensor, Tensor | None]]) -> dict[str, dict[str, np.ndarray]]:
    """The sums of `Interval.rows` on this rank."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for task, names, columns, items in parts:
        values = columns.double().cpu().numpy()
        of_row = np.resize(np.arange(len(names)), values.shape[1]) if items is None else items.cpu().numpy()
        known, numbers = np.unique(names, return_inverse=True)
        numbers = numbers.reshape(len(names), -1)[of_row]  # [R, 1 or 2]
        counted = np.ones(numbers.shape, bool)
        counted[:, 1:] = numbers[:, 1:] != numbers[:, :1]  # a mixed pair of two pairs with one name
        sums = np.stack(
            [
                np.bincount(numbers[counted], np.broadcast_to(column[:, None], numbers.shape)[counted], len(known))
                for column in (np.ones(len(numbers)), *values)
            ],
            axis=1,
        )
        _add(found.setdefault(task, {}), dict(zip(known.tolist(), sums, strict=True)))
    return found


def _add(sums: dict[str, np.ndarray], more: Mapping[str, np.ndarray]) -> None:
    for name, values in more.items():
        sums[name] = sums.get(name, 0) + values


def by_language(rows: Mapping[str, np.ndarray], sides: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The mean loss of each language: of pairs, over all that the language is a side of. `rows`: of one task, see
    `Interval`; `sides`: the languages of each pair; what is not in it is a language."""
    sums: dict[str, np.ndarray] = {}
    for name, values in rows.items():
        for language in sides.get(name, [name]):
            _add(sums, {language: values[:2]})
    return {language: float(loss / count) for language, (count, loss) in sorted(sums.items()) if count}


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
