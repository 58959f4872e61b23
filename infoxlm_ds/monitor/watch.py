"""`infoxlm watch`: a table of a run in another terminal. It reads what the run writes, and nothing else."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from infoxlm_ds.monitor.failures import causes
from infoxlm_ds.monitor.history import Row, metrics_of, read_rows
from infoxlm_ds.monitor.progress import LOSSES, clock, short
from infoxlm_ds.monitor.starts import STARTS, read_starts

EVERY = 2.0  # seconds between two looks
RECENT = 5  # lines of the log whose mean speed gives the time that is left
LATE = 5.0, 60.0  # a run is late after so many times the usual interval, and so many seconds


def watch(run: Path, console: Console, once: bool = False) -> None:
    """Show the run until it ends or ^C. `once`, or without a terminal: show it once. UserError if it is no run."""
    watched = Watched(run)
    if once or not console.is_terminal:
        console.print(watched.table())
        return
    with suppress(KeyboardInterrupt), Live(watched.table(), console=console, auto_refresh=False) as live:
        while not watched.over:
            time.sleep(EVERY)
            watched.look()
            live.update(watched.table(), refresh=True)


class Watched:
    """What a run has written so far. `over`: it has ended."""

    def __init__(self, run: Path) -> None:
        self._run, self._path = run, metrics_of(run)
        self._begin()
        self.look()

    def _begin(self) -> None:
        self._file, self._offset = (0, 0), 0
        self._newest: Row = {}
        self._log: deque[Row] = deque(maxlen=RECENT + 1)
        self._values: Row = {}  # the last value of each scalar
        self._saved: int | None = None
        self._warnings: list[str] = []

    def look(self) -> None:
        """Read the lines that are new."""
        for row in read_rows(self._new_lines()):
            self._newest = row
            self._values |= row
            if "seconds" in row:
                self._log.append(row)
            if "checkpoint/blocked" in row:
                self._saved = row["step"]
            if "warning" in row:
                self._warnings.append(f"step {row['step']}: {row.get('text')}")
        self._failed = causes(self._run)

    def _new_lines(self) -> list[str]:
        """Whole lines since the last look. If the run has started again, the file may be another one, or shorter."""
        try:
            with self._path.open("rb") as file:
                stat = self._path.stat()
                if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset:
                    self._begin()
                self._file = (stat.st_dev, stat.st_ino)
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:  # the run's folder is gone
            return []
        self._offset += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()

    @property
    def over(self) -> bool:
        """Whether the run has ended or failed, and has not started again."""
        return bool(self._failed) or ("ended" in self._newest and not self._started_again)

    @property
    def _started_again(self) -> bool:
        with suppress(OSError):
            return (self._run / STARTS).stat().st_mtime > self._path.stat().st_mtime
        return False

    def table(self) -> Table:
        """What is known now."""
        table = Table("", "", title=Text(str(self._run)), box=box.SIMPLE, show_header=False, title_justify="left")
        for name, value in self._cells().items():
            table.add_row(name, Text(value))
        return table

    def _cells(self) -> dict[str, str]:
        values, starts = self._values, read_starts(self._run)
        steps = starts[-1].get("steps") if starts else None
        cells = {"step": f"{self._newest.get('step', 0):,}" + (f" of {steps:,}" if isinstance(steps, int) else "")}
        cells["state"] = self._state()
        cells["losses"] = ", ".join(f"{label} {short(values[n])}" for n, label in LOSSES.items() if n in values)
        if "probe/mean" in values:
            best = f", best {values['probe/best']:.3f}" if "probe/best" in values else ""
            cells["probe"] = f"{values['probe/mean']:.3f}{best}"
        if "speed/tokens" in values:
            cells["tokens/s"] = short(values["speed/tokens"])
            cells["data wait"] = f"{values.get('speed/data_wait_share', 0):.1%}"
        if isinstance(steps, int) and not self.over and (seconds := self._seconds_a_step()):
            cells["time left"] = clock((steps - self._newest["step"]) * seconds)
        cells["checkpoint"] = "none" if self._saved is None else f"step {self._saved:,}"
        cells["warnings"] = "\n".join(self._warnings) or "none"
        return cells

    def _seconds_a_step(self) -> float | None:
        rows = list(self._log)
        if len(rows) < 2 or rows[-1]["step"] <= rows[0]["step"]:
            return None
        return sum(row["seconds"] for row in rows[1:]) / (rows[-1]["step"] - rows[0]["step"])

    def _state(self) -> str:
        if self._failed:
            return f"failed: {'; '.join(f'rank {failure.rank}: {failure.cause}' for failure in self._failed)}"
        if self.over:
            return str(self._newest["ended"])
        try:
            age = max(0.0, time.time() - self._path.stat().st_mtime)
        except FileNotFoundError:
            return "its folder is gone"
        usual = max((row["seconds"] for row in self._log), default=0.0)
        late = "; stalled?" if self._log and age > max(LATE[0] * usual, LATE[1]) else ""
        return f"the newest line is {clock(age)} old{late}"
