"""Runs the tasks of a stage: in this process, in a pool of processes, on Ray, or as one part of a Slurm array.

A task is done when its output is there, and an output gets its name when it is whole. So a build that was killed goes
on where it was, and several machines can share a build through a common folder.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from infoxlm_ds.atomic import sync
from infoxlm_ds.config import UserError

INTERVAL = 10.0  # seconds between lines when no terminal watches
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent is gone
POLL = 1.0  # seconds between looks for what other parts do


class Task(NamedTuple):
    """Work on an argument, written to `out`. `bytes`: of its input, for the progress."""

    work: Callable[[Any, Path], None]
    argument: Any
    out: Path
    bytes: int


class How(NamedTuple):
    """Where tasks run. `part`: this process does every n-th task, beginning with i; the others do the rest."""

    workers: int = 1
    ray: bool = False
    part: tuple[int, int] = (0, 1)


ONE = How()


class Stage(NamedTuple):
    """`counts`: what a finished task has counted, to be shown."""

    name: str
    tasks: Sequence[Task]
    counts: Callable[[Path], Counter[str]] = lambda _: Counter()


def run(stage: Stage, how: How, console: Console) -> None:
    """Do the tasks of a stage whose output is not there. UserError of a task ends the stage."""
    if not stage.tasks:
        return
    part, parts = how.part
    left = []
    with _Progress(stage, console) as progress:
        for number, task in enumerate(stage.tasks):
            if task.out.exists():
                progress.done(task, new=False)
            else:
                left.append((number, task))
        for task in _ran([task for number, task in left if number % parts == part], how):
            progress.done(task)
        _wait_for_others([task for number, task in left if number % parts != part], progress)


def do(task: Task) -> None:
    """Run a task, unless it is done."""
    if task.out.exists():
        return
    task.out.parent.mkdir(parents=True, exist_ok=True)
    partial = task.out.with_name(f"{task.out.name}.{os.getpid()}.partial")
    try:
        task.work(task.argument, partial)
        sync(partial)
        partial.replace(task.out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def _ran(tasks: list[Task], how: How) -> Iterator[Task]:
    """Each task when it is done."""
    if how.ray:
        yield from _on_ray(tasks, how)
    elif how.workers == 1 or len(tasks) < 2:
        for task in tasks:
            do(task)
            yield task
    else:
        yield from _in_pool(tasks, how.workers)


def _in_pool(tasks: list[Task], workers: int) -> Iterator[Task]:
    # Workers are not forked from this process, which may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _follow, (os.getpid(),))
    try:
        running = {pool.submit(do, task): task for task in tasks}
        for future in as_completed(running):
            future.result()
            yield running[future]
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps because memory ran out: run the same command again to go on, "
            "with fewer --workers"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()):  # a task may take minutes, and is begun again
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _follow(parent: int) -> None:
    """Leave ^C to the parent, and die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


def _on_ray(tasks: list[Task], how: How) -> Iterator[Task]:
    try:
        import ray
    except ImportError:
        raise UserError("--on ray needs Ray: pip install 'infoxlm-ds[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        where = {"address": address} if address else {"address": "local", "num_cpus": how.workers}
        ray.init(**where, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    remote = ray.remote(num_cpus=1, max_retries=3)(do)
    running = {remote.remote(task): task for task in tasks}
    while running:
        (reference,), _ = ray.wait(list(running), num_returns=1)
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        yield running.pop(reference)


def _wait_for_others(tasks: list[Task], progress: _Progress) -> None:
    progress.waits = bool(tasks)
    while tasks:
        for task in [task for task in tasks if task.out.exists()]:
            tasks.remove(task)
            progress.done(task)
        if tasks:
            time.sleep(POLL)
            progress.tell()


class _Progress:
    """A bar on a terminal, else a line from time to time: bytes, rate, time left, and what was counted. `waits`: this
    part has done its tasks."""

    waits = False

    def __init__(self, stage: Stage, console: Console) -> None:
        self._stage, self._console = stage, console
        self._bytes, self._all, self._new = 0, sum(task.bytes for task in stage.tasks), 0
        self._tasks, self._counts = 0, Counter[str]()
        self._started = self._told = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}")
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._id = self._bar.add_task(stage.name, total=self._all, figures="") if self._bar else None

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
        self.tell(last=True)

    def done(self, task: Task, new: bool = True) -> None:
        self._tasks += 1
        self._bytes += task.bytes
        self._new += task.bytes * new
        self._counts += self._stage.counts(task.out)
        self.tell()

    def tell(self, last: bool = False) -> None:
        now = time.monotonic()
        if self._bar and not last:
            self._bar.update(self._id, completed=self._bytes, figures=self._figures(now))  # type: ignore[arg-type]
        elif last or (now - self._told > INTERVAL and self._tasks < len(self._stage.tasks)):
            self._told = now
            self._console.print(f"{self._stage.name}: {self._figures(now)}", highlight=False, markup=False)

    def _figures(self, now: float) -> str:
        rate = self._new / max(now - self._started, 1e-9)
        figures = [f"{self._tasks:,} of {len(self._stage.tasks):,} tasks", f"{self._bytes / 1e6:,.1f} MB"]
        if self._new:
            figures.append(f"{rate / 1e6:,.1f} MB/s")
            if self._bytes < self._all and not self.waits:
                left = int((self._all - self._bytes) / rate)
                figures.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self.waits and self._tasks < len(self._stage.tasks):
            figures.append("waiting for the other parts")
        figures += [f"{name} {count:,}" for name, count in self._counts.most_common(6) if count]
        return ", ".join(figures)
