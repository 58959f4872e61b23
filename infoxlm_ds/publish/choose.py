"""Which checkpoint of a run to export."""

from __future__ import annotations

from pathlib import Path

from infoxlm_ds.checkpoint.store import Store, step_of
from infoxlm_ds.config import UserError
from infoxlm_ds.monitor.history import METRICS, read_history


def best_step(run: Path) -> int:
    """The step whose checkpoint had the highest probe accuracy, of the checkpoints that the run still has; of equals,
    the latest. UserError if none of them was probed."""
    accuracies, kept = _probed(run), [step_of(path) for path in Store(run).steps()]
    if not kept:
        raise UserError(f"{run} holds no checkpoint: train there first, or correct the path")
    if not accuracies:
        raise UserError(f"--best: {run / METRICS} has no probe: set probe in the recipe, or give --step")
    candidates = [step for step in kept if step in accuracies]
    if not candidates:
        raise UserError(
            f"--best: the probes were at steps {_list(accuracies)}, the checkpoints are of steps {_list(kept)}: give "
            "--step, and next time make probe.every and checkpoint.every the same"
        )
    best = max(candidates, key=lambda step: (accuracies[step], step))
    highest = max(accuracies, key=lambda step: (accuracies[step], step))
    print(f"step {best} has the best probe of the {len(candidates)} checkpoints that have one: {accuracies[best]:.3f}")
    if accuracies[highest] > accuracies[best]:
        print(f"step {highest} had {accuracies[highest]:.3f}, but its checkpoint is not kept (checkpoint.keep)")
    return best


def _probed(run: Path) -> dict[int, float]:
    """Mean probe accuracy by step. A run that went back measured a step again: the last line counts."""
    return dict(sorted(dict(zip(*read_history(run).series("probe/mean"), strict=True)).items()))


def _list(steps: dict[int, float] | list[int]) -> str:
    return ", ".join(map(str, steps))
