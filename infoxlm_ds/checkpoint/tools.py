"""`infoxlm checkpoint list|verify|prune`: lists, verifies and removes the checkpoints of a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from infoxlm_ds.atomic import SUFFIX
from infoxlm_ds.checkpoint.store import Store, damage_of, read_receipts, read_state, step_of
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.reading import check

# What a folder with this ending is.
LEFT = {
    SUFFIX: "being written, or left by a run that was killed: removed at the next start",
    ".removed": "being removed: finished at the next start",
    ".damaged": "a damaged checkpoint: `infoxlm checkpoint prune` removes it",
}


def list_checkpoints(run: Path, console: Console) -> None:
    """Print a table of the checkpoints, oldest first. It checks that files exist; it does not read them all."""
    store, newest = Store(run), Store(run).at()
    table = Table("step", "written", "GB", "ranks", "ZeRO", "precision", "best probe", "", box=None)
    steps = store.steps()
    for path in steps:
        table.add_row(str(step_of(path)), *_about(path), _remarks(path, path == newest))
    console.print(table)
    if newest not in steps:
        console.print(
            f"`latest` points to {newest.name}, which is gone: `resume.fallback=true` goes on from an older one"
        )
    for path in sorted(store.folder.glob("step-*")):
        if path not in steps:
            console.print(f"{path.name}: {LEFT.get(path.suffix, 'newer than `latest`: it was not committed')}")


def verify(run: Path, step: int | None, console: Console) -> bool:
    """Read every byte of all checkpoints, or of one. Returns whether all are undamaged."""
    store = Store(run)
    whole = True
    for folder in [store.at(step)] if step is not None or not store.steps() else store.steps():
        damage = read_through(folder, console)
        whole &= not damage
        console.print(f"{folder.name}: {damage or f'whole, {_size(folder) / 1e9:.3f} GB'}", soft_wrap=True)
    return whole


def read_through(folder: Path, console: Console) -> str:
    """What is wrong with a committed folder; empty if nothing is. Shows a progress bar: large folders take minutes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"reading {folder.name}", total=_size(folder))
        return damage_of(folder, seen=lambda size: bar.advance(task, size))


def prune(run: Path, keep: int | None, keep_every: int | None, dry_run: bool, console: Console) -> None:
    """Remove all checkpoints but the newest `keep` and the steps that are a multiple of `keep_every` (defaults: the
    recipe's). Also remove damaged checkpoints that were renamed."""
    store, newest = Store(run), Store(run).at()
    if damage := damage_of(newest):
        raise UserError(f"{newest}: {damage}: nothing is removed while the newest is damaged")
    settings = check(Recipe, read_state(newest)["recipe"], str(newest)).checkpoint
    if not dry_run and (holder := store.acquire()):
        raise UserError(f"{holder} trains in {run} and removes old checkpoints itself: wait for it")
    removed = store.prune(keep or settings.keep, keep_every or settings.keep_every, dry_run)
    damaged = sorted(store.folder.glob("step-*.damaged"))
    for path in damaged if not dry_run else []:
        shutil.rmtree(path)
    names = [path.name for path in (*removed, *damaged)]
    console.print(f"{'would remove' if dry_run else 'removed'}: {', '.join(names) or 'nothing'}", soft_wrap=True)


def _about(path: Path) -> Iterator[str]:
    """Time, size, ranks, ZeRO stage, precision, best probe; a dash where the files cannot be read."""
    yield time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
    yield f"{_size(path) / 1e9:.3f}"
    try:
        state: dict[str, Any] = read_state(path)
    except UserError:
        yield from "----"
        return
    yield str(state["world_size"])
    yield str(state["zero_stage"])
    yield state["precision"]
    yield f"{state['best']['value']:.3f} at {state['best']['step']}" if state["best"] else "-"


def _remarks(path: Path, newest: bool) -> str:
    try:
        whole = all((path / r.name).is_file() for r in read_receipts(path)) and bool(read_state(path))
    except UserError:
        whole = False
    remarks = ["newest"] if newest else []
    remarks += [] if whole else ["DAMAGED: `infoxlm checkpoint verify` names the file"]
    return ", ".join(remarks)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
