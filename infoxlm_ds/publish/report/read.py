"""What a run's folder tells: its figures, its recipe, its checkpoints, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infoxlm_ds.checkpoint.store import Store, read_state, step_of
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.monitor.history import History, metrics_of, read_history
from infoxlm_ds.planner import mixture
from infoxlm_ds.reading import check


class Saved(NamedTuple):
    """A checkpoint: its folder, step, time of writing and bytes."""

    folder: Path
    step: int
    written: str
    bytes: int


@dataclass(frozen=True)
class Run:
    """`recipe`: of the newest checkpoint; None if there is none yet."""

    folder: Path
    name: str
    history: History
    recipe: Recipe | None
    checkpoints: list[Saved]

    @property
    def last_step(self) -> int:
        """The step of the last line of metrics.jsonl."""
        return int(self.history.rows[-1]["step"])

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the highest mean accuracy of the probes, and that accuracy."""
        steps, values = self.history.series("probe/mean")
        return max(zip(steps, values, strict=True), key=lambda item: (item[1], item[0]), default=None)

    def languages(self) -> list[str]:
        """The languages that the probe measures."""
        found = {name.removeprefix("probe/") for row in self.history.rows for name in row if name.startswith("probe/")}
        return sorted(found - {"mean", "best", "trigram_mean"})


def read_run(folder: Path) -> Run:
    """What a run's folder tells. UserError if it is no run's, or if it has no figures yet."""
    path = metrics_of(folder)
    history = read_history(folder)
    if not history.rows:
        raise UserError(f"{path} has no line that can be read: wait for the first line of the log, or check the file")
    saved = [_saved(path) for path in Store(folder).steps()]
    recipe = None
    if saved:
        recipe = check(Recipe, read_state(saved[-1].folder)["recipe"], str(saved[-1].folder))
    return Run(folder, folder.absolute().name, history, recipe, saved)


def _saved(folder: Path) -> Saved:
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
    return Saved(folder, step_of(folder), written, size)


def warnings_of(run: Run) -> Iterator[str]:
    """What a reader should know first, a sentence each."""
    rows = run.history.rows
    for row in [row for row in rows if "warning" in row]:
        yield f"Step {row['step']:,}: {row.get('text')}."
    if run.history.unreadable:
        yield f"{run.history.unreadable} lines of metrics.jsonl could not be read and are missing here."
    if skipped := [row for row in rows if "skipped" in row]:
        last = skipped[-1]
        yield f"{len(skipped)} steps were not applied; the last, after step {last['step']}: {last['skipped']}"
    for row in [row for row in rows if "save_failed" in row][-1:]:
        yield f"A checkpoint could not be written at step {row['step']}: {row['save_failed']}"
    if damaged := run.history.last("data/damaged_draws"):
        yield f"{damaged['data/damaged_draws']:.0f} draws of damaged packs were left out."
    filled = run.history.last("queue/filled")
    if filled and filled["queue/filled"] < 1:
        yield f"The queue of negatives is filled to {filled['queue/filled']:.0%}, and is not read before it is full."
    probe = run.history.last("probe/mean")
    if probe and probe["probe/mean"] < probe.get("probe/trigram_mean", 0):
        yield (
            f"Held-out retrieval is at {probe['probe/mean']:.3f}, below the {probe['probe/trigram_mean']:.3f} of "
            "character trigrams, which need no training."
        )
    if probe and run.best and run.best[0] < probe["step"]:
        best, now = run.best[1], probe["probe/mean"]
        yield f"The best probe was at step {run.best[0]:,} ({best:.3f}), not at the last ({now:.3f})."
    waits = run.history.series("speed/data_wait_share")[1]
    if waits and sum(waits) / len(waits) > 0.05:
        yield f"Training waited for data {sum(waits) / len(waits):.0%} of the time."
    if run.recipe and run.last_step < run.recipe.optimizer.steps:
        yield f"It has made {run.last_step:,} of {run.recipe.optimizer.steps:,} steps."


def planned_shares(run: Run) -> dict[str, dict[str, float]]:
    """Each language's expected share of the texts, by task. Empty if there is no recipe or the corpus is gone."""
    if run.recipe is None:
        return {}
    try:
        return mixture.planned_shares(run.recipe, Corpus(run.recipe.corpus, look_at_files=False))
    except (UserError, OSError):
        return {}


def settings(run: Run) -> dict[str, Any]:
    """The recipe as it is written to a checkpoint."""
    return {} if run.recipe is None else run.recipe.model_dump(mode="json")
