"""What a run has cost up to a checkpoint: hours of its devices, and floating-point operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.monitor.history import History
from infoxlm_ds.monitor.starts import read_starts
from infoxlm_ds.planner.cost import flops, tokens_per_step
from infoxlm_ds.planner.workload import Setting, Shape, read_text

UNKNOWN = "devices that were not recorded"


class Compute(NamedTuple):
    """`hours`: of all ranks together, by device. `ranks`: all numbers of ranks that it ran on. Where the run recorded
    no start, the device is UNKNOWN, and a step counts with the ranks of the checkpoint."""

    hours: dict[str, float]
    ranks: list[int]


def hours(history: History, run: Path, ranks: int) -> Compute:
    """Add up the intervals between two logs. `ranks`: those of the checkpoint. What a crash threw away and what a
    start takes before its first step are in no interval."""
    starts, found, used = read_starts(run), dict[str, float](), set[int]()
    for row in history.intervals:
        before = [start for start in starts if start["step"] < row["step"]]
        device, used_now = (str(before[-1]["device"]), int(before[-1]["ranks"])) if before else (UNKNOWN, ranks)
        found[device] = found.get(device, 0.0) + row["seconds"] / 3600 * used_now
        used.add(used_now)
    return Compute(found, sorted(used))


def operations(history: History, recipe: Recipe, state: dict[str, Any]) -> float | None:
    """Operations of the steps so far, recomputed ones included: the recipe's estimate for a token, times the tokens
    that were measured. None if the corpus, or the model that the run began with, is not there. `state`: the
    checkpoint's."""
    try:
        text = read_text(recipe)
        shape = Shape.of(recipe, text.vocabulary)
    except (UserError, OSError):
        return None
    if recipe.model.init and shape.own:
        return None
    setting = Setting(recipe, state["engine"], shape, text, state["world_size"])
    return sum(flops(setting).values()) / tokens_per_step(setting) * history.tokens
