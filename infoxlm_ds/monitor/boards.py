"""Where a run's figures can go beside metrics.jsonl: TensorBoard, Weights & Biases, metrics.csv. All use the names of
`tags.py`.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import secrets
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import Log, UserError
from infoxlm_ds.monitor.lines import Lines
from infoxlm_ds.monitor.meters import Scalars
from infoxlm_ds.monitor.pictures import Picture
from infoxlm_ds.monitor.tags import FINAL, GROUPS, TASKS

Numbers = dict[str, float | str | bool]
WANDB_MISSING = "log.wandb needs the package wandb: pip install 'infoxlm-ds[wandb]', or remove log.wandb"


class Board:
    """Shows what it can of a run; the rest it leaves out. OSError if something cannot be written."""

    name: str

    def begin(self, texts: Mapping[str, str], settings: Numbers) -> None:
        """`texts`: Markdown by name; `settings`: what one compares runs by."""

    def scalars(self, step: int, values: Scalars) -> None:
        """Values by tag."""

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        """A picture, by tag."""

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """How values [n] are distributed, by tag."""

    def close(self) -> None:
        """Complete what is written."""


class TensorBoard(Board):
    """Event files in a folder with the run's name, which TensorBoard shows as the run's name."""

    name = "TensorBoard"

    def __init__(self, run: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = partial(_of_a_thread, threading.excepthook)
        self._first = first
        self._writer = SummaryWriter(str(run / "tensorboard" / run.absolute().name), purge_step=first + 1)

    def begin(self, texts: Mapping[str, str], settings: Numbers) -> None:
        from torch.utils.tensorboard.summary import hparams

        for name, text in texts.items():
            self._writer.add_text(name, text, self._first)
        self._writer.add_custom_scalars(_layout())
        # Not `add_hparams`, which makes a run of its own. The figures are the last scalars with these tags.
        for summary in hparams(settings, dict.fromkeys(FINAL, 0)):
            self._writer._get_file_writer().add_summary(summary)

    def scalars(self, step: int, values: Scalars) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        self._writer.add_histogram(tag, values, step)

    def close(self) -> None:
        self._writer.close()


def _layout() -> dict[str, dict[str, list[Any]]]:
    """The page of custom scalars: the three losses beside the three bounds, then the other groups in their order."""
    first = {
        "losses, nats": ["Multiline", [f"loss/{task}$" for task in TASKS]],
        "bounds on mutual information, nats": ["Multiline", [f"bound/{task}$" for task in TASKS]],
    }
    pages: dict[str, dict[str, list[Any]]] = {"1. losses and bounds": first}
    for number, group in enumerate(GROUPS[2:], 2):
        pages[f"{number}. {group}"] = {group: ["Multiline", [f"^{group}/"]]}
    return pages


def _of_a_thread(others: Any, args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer raises its thread's error again where it is used: here it would only be a traceback."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        others(args)


class Csv(Board):
    """`metrics.csv`: a line for each step and tag, so that a spreadsheet can pivot them."""

    HEAD = "step,tag,value\n"

    def __init__(self, run: Path, first: int) -> None:
        path = run / "metrics.csv"
        self.name = str(path)
        if path.is_file():
            _keep(path, first)
        self._lines = Lines(path, self.HEAD)

    def scalars(self, step: int, values: Scalars) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((step, name, repr(value)) for name, value in values.items())
        self._lines.append(text.getvalue())

    def close(self) -> None:
        self._lines.close()


def _keep(path: Path, first: int) -> None:
    """Remove the lines of steps after `first`, and those that are not whole."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines[1:] if line.count(",") == 2 and line.endswith("\n") and _step(line) <= first]
    write_file(path, Csv.HEAD + "".join(kept))


def _step(line: str) -> float:
    step = line.partition(",")[0]
    return int(step) if step.isdecimal() else float("inf")


class Wandb(Board):
    """A run of Weights & Biases. It goes on with a run that the same folder has begun."""

    name = "Weights & Biases"

    def __init__(self, run: Path, first: int, project: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._wandb, known = wandb, run / "wandb" / "id"
        identity = known.read_text() if first and known.is_file() else secrets.token_hex(8)
        self._run = wandb.init(
            project=project,
            name=run.absolute().name,
            dir=run,
            id=identity,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        known.parent.mkdir(parents=True, exist_ok=True)
        write_file(known, identity)

    def begin(self, texts: Mapping[str, str], settings: Numbers) -> None:
        self._run.config.update(dict(settings) | dict(texts), allow_val_change=True)

    def scalars(self, step: int, values: Scalars) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        self._run.log({tag: self._wandb.Image(picture)}, step=step)

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        self._run.log({tag: self._wandb.Histogram(values)}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_boards(log: Log) -> None:
    """UserError if a board's package is missing."""
    if log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(WANDB_MISSING)


def open_boards(log: Log, run: Path, first: int) -> list[Board]:
    """The boards that a recipe asks for, of a run that starts after step `first`."""
    boards: list[Board] = [TensorBoard(run, first)] if log.tensorboard else []
    if log.csv:
        boards.append(Csv(run, first))
    if log.wandb:
        boards.append(Wandb(run, first, log.wandb))
    return boards
