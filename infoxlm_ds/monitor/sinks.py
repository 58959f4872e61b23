"""Writes the metrics: always to metrics.jsonl, by default to TensorBoard, and as a progress line on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from infoxlm_ds.atomic import write_file
from infoxlm_ds.monitor.meters import Scalars

SHOWN = {
    "mmlm/loss": "mmlm",
    "tlm/loss": "tlm",
    "xlco/loss": "xlco",
    "xlco/accuracy": "acc",
    "speed/tokens": "tok/s",
    "speed/mfu": "mfu",
}


class Sinks:
    """Rank 0's outputs of a run. A context manager, which flushes and closes them."""

    def __init__(self, run: Path, first: int, steps: int, tensorboard: bool) -> None:
        """The run starts after step `first` of `steps`. Lines of later steps, from before a crash, are removed."""
        run.mkdir(parents=True, exist_ok=True)
        self._metrics = _reopened(run / "metrics.jsonl", first)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)
        self._console = Console()
        self._bar = _progress(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("", total=steps, figures="") if self._bar else None
        self._steps = steps

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        self._metrics.close()
        if self._board:
            self._board.close()

    def write(self, step: int, values: Scalars, more: dict[str, Any] | None = None) -> None:
        """Write the scalars of a step; `more` goes to metrics.jsonl only."""
        print(json.dumps({"step": step} | values | (more or {})), file=self._metrics, flush=True)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, values: Scalars, seconds_left: float) -> None:
        figures = " ".join(f"{short} {_short(values[name])}" for name, short in SHOWN.items() if name in values)
        if (filled := values.get("queue/filled", 1.0)) < 1:
            figures += f" queue {filled:.0%}"
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)  # type: ignore[arg-type]
        else:
            self.say(f"step {step}/{self._steps} {figures} eta {_clock(seconds_left)}")

    def say(self, text: str) -> None:
        """Print a line that the progress bar does not overwrite."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _reopened(path: Path, first: int) -> TextIO:
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
        write_file(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _progress(console: Console) -> Progress:
    # No bar: in 80 columns it would leave no space for the figures.
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
