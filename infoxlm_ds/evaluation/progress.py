"""The progress of long work: a bar on a terminal, else a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

INTERVAL = 10.0  # seconds between lines when no terminal watches


def blocks(total: int, size: int, what: str = "", first: int = 0) -> Iterator[slice]:
    """Slices of at most `size` from `first` to `total`. Standard error shows how much is done; without `what`,
    nothing."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    started = told = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not (what and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total, completed=first)
        for start in range(first, total, size):
            end = min(start + size, total)
            yield slice(start, end)
            bar.update(task, completed=end)
            now = time.monotonic()
            if what and not console.is_terminal and now - told > INTERVAL:
                told = now
                left = timedelta(seconds=int((now - started) * (total - end) / (end - first)))
                console.print(f"{what}: {end:,} of {total:,}, {left} left", highlight=False, markup=False)
