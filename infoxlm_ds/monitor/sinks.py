"""Writes the metrics: always to metrics.jsonl, to the boards that the recipe asks for, and as a progress line on the
screen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import Log
from infoxlm_ds.monitor.boards import Board, Numbers, open_boards
from infoxlm_ds.monitor.history import METRICS, read_history
from infoxlm_ds.monitor.lines import Lines
from infoxlm_ds.monitor.meters import Scalars
from infoxlm_ds.monitor.pictures import Picture
from infoxlm_ds.monitor.progress import progress_line
from infoxlm_ds.monitor.tags import tag
from infoxlm_ds.monitor.watchdogs import Watchdogs
from infoxlm_ds.trouble import pointer


class Sinks:
    """Rank 0's outputs of a run. A context manager, which flushes and closes them. If the disk is full, training goes
    on, and what is not written is said once."""

    def __init__(self, run: Path, first: int, steps: int, log: Log, watchdogs: Watchdogs | None = None) -> None:
        """The run starts after step `first` of `steps`. Lines of later steps, from before a crash, are removed.
        `watchdogs`: look at every line that is written, and are told those that are there."""
        run.mkdir(parents=True, exist_ok=True)
        self._console = Console()
        self._path, self._missing = run / METRICS, 0  # lines that did not fit, since the last that did
        if aside := _cut(self._path, first):
            self.say(
                f"{self._path} had lines that cannot be read: it is kept as {aside.name}, and the others go on here"
            )
        self.watchdogs = watchdogs
        if watchdogs is not None:
            for row in read_history(run).rows:
                watchdogs.recall(row)
        self._metrics = Lines(self._path)
        self._boards = open_boards(log, run, first)
        self._steps, self.last = steps, Scalars()  # the figures of the last line of the log
        started = Text(f"step {first}/{steps}")
        self._live = Live(started, console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        self._metrics.close()
        self._to_boards(lambda board: board.close())

    def begin(self, texts: Mapping[str, str], settings: Numbers) -> None:
        """Describe the run to the boards, see `Board.begin`."""
        self._to_boards(lambda board: board.begin(texts, settings))

    def write(
        self, step: int, values: Scalars, more: dict[str, Any] | None = None, tagged: Scalars | None = None
    ) -> None:
        """Write the scalars of a step. `more` goes to metrics.jsonl only, `tagged` to the boards only, by tag."""
        row = {"step": step} | values | (more or {})
        try:
            self._metrics.append(f"{json.dumps(row)}\n")
        except OSError as error:
            if self._missing == 0:
                self.warn(f"{self._path} cannot be written: {error.strerror}. Training goes on without it")
            self._missing += 1
        else:
            if self._missing:
                self.say(f"{self._path} is written again; {self._missing} lines are missing")
            self._missing = 0
        shown = {tag(name): value for name, value in values.items()} | (tagged or {})
        self._to_boards(lambda board: board.scalars(step, shown))
        for warned in self.watchdogs.look(row) if self.watchdogs else ():
            self.warn(f"warning: {warned.text}")
            self.write(step, {}, {"warning": warned.name, "text": warned.text})

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        """Show a picture on the boards."""
        self._to_boards(lambda board: board.picture(step, tag, picture))

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Show how `values` [n] are distributed."""
        self._to_boards(lambda board: board.histogram(step, tag, values))

    def _to_boards(self, job: Callable[[Board], object]) -> None:
        for board in list(self._boards):
            try:
                job(board)
            except OSError as error:  # TensorBoard's is of its writer's thread, which has ended
                self._boards.remove(board)
                self.say(f"{board.name} cannot be written: {error.strerror}. It ends here until the next start")

    def progress(self, step: int, values: Scalars, seconds_left: float) -> None:
        """Show the figures of a line of the log: on a terminal in its last line, elsewhere in a line of their own."""
        self.last = values
        if self._live:
            line = progress_line(step, self._steps, values, seconds_left, self._console.width)
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.say(progress_line(step, self._steps, values, seconds_left))

    def say(self, text: str) -> None:
        """Print a line that the progress bar does not overwrite."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print such a line, with a pointer to what the documentation says about it."""
        self.say(text + pointer(text))


def _cut(path: Path, first: int) -> Path | None:
    """Remove the lines of steps after `first`, and what a kill left of a last line. If other lines cannot be read, they
    are removed too, and the file as it was is kept: returns its path."""
    if not path.is_file():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    whole = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
    steps = [_step_of(line) for line in whole]
    kept = [line for line, step in zip(whole, steps, strict=True) if step is not None and step <= first]
    aside = None
    if None in steps:
        aside = path.with_name(f"{path.name}.damaged-{os.getpid()}")
        path.replace(aside)
    if aside or len(kept) < len(lines):
        write_file(path, b"".join(kept).decode())
    return aside


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics, or None if it is not one."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
