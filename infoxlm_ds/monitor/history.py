"""What a run's metrics.jsonl says of the steps up to a checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from infoxlm_ds.config import UserError
from infoxlm_ds.monitor.tags import TASKS

METRICS = "metrics.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """The lines of metrics.jsonl, in the order of their steps. `unreadable`: how many others the file has."""

    rows: tuple[Row, ...]
    unreadable: int = 0

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a scalar."""
        found = [(row["step"], float(row[name])) for row in self.rows if isinstance(row.get(name), int | float)]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str) -> Row | None:
        """The last line that has a scalar."""
        return next((row for row in reversed(self.rows) if name in row), None)

    @cached_property
    def intervals(self) -> list[Row]:
        """The lines that tell of an interval between two logs."""
        return [row for row in self.rows if "seconds" in row and "speed/tokens" in row]

    @property
    def tokens(self) -> float:
        """Tokens of text that all ranks have read."""
        return sum(row["speed/tokens"] * row["seconds"] for row in self.intervals)

    @property
    def hours(self) -> float:
        """Hours of the clock, in all intervals."""
        return sum(row["seconds"] for row in self.intervals) / 3600

    @cached_property
    def items(self) -> dict[str, Counter[str]]:
        """For each task, how many sides of its items were in each language. A pair has two."""
        tasks: dict[str, Counter[str]] = {}
        alone = {language for row in self.intervals for language in row["languages"].get("mmlm", {})}
        for row in self.intervals:
            for task, counts in row["languages"].items():
                of_task = tasks.setdefault(task, Counter())
                for name, count in counts.items():
                    for language in [name] if task == "mmlm" else sides_of(name, alone):
                        of_task[language] += count
        return tasks


def metrics_of(run: Path) -> Path:
    """The file with the figures of a run. UserError if the folder has none."""
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl: give the folder of a run that has begun, `run` in its recipe")
    return path


def read_history(run: Path, step: int | None = None) -> History:
    """The lines up to `step`; None: all. Damaged lines are left out; without a readable file, there are none."""
    try:
        lines = (run / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return History(())
    rows = list(read_rows(lines))
    kept = tuple(row for row in rows if step is None or row["step"] <= step)
    return History(kept, sum(1 for line in lines if line.strip()) - len(rows))


def read_rows(lines: Sequence[str]) -> Iterator[Row]:
    """The lines that can be read."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and _is_sound(row):
            yield row


def _is_sound(row: Row) -> bool:
    """Whether all figures are numbers and an interval has its counts: with flipped bits, a line may still be JSON."""
    figures = [value for name, value in row.items() if "/" in name or name in ("loss", "seconds")]
    tasks = row.get("languages") if "seconds" in row else {}
    return (
        all(isinstance(figure, int | float) for figure in figures)
        and isinstance(tasks, dict)
        and tasks.keys() <= TASKS.keys()
        and all(isinstance(counts, dict) for counts in tasks.values())
        and all(isinstance(count, int) for counts in tasks.values() for count in counts.values())
    )


def sides_of(pair: str, known: set[str]) -> list[str]:
    """The two languages of a pair such as en-sv. A code may have a hyphen itself: then `known` decides, and a pair that
    cannot be divided stays as it is."""
    parts = pair.split("-")
    if len(parts) == 2:
        return parts
    cuts = [("-".join(parts[:i]), "-".join(parts[i:])) for i in range(1, len(parts))]
    return next((list(cut) for cut in cuts if set(cut) <= known), [pair])
