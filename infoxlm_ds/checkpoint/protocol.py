"""One save of all ranks. Every rank writes its files, a neighbour reads them back, and only then rank 0 renames the
folder to its final name and points `latest` at it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from infoxlm_ds import dist
from infoxlm_ds.checkpoint.files import Contents, write_files
from infoxlm_ds.checkpoint.store import Receipt, Store
from infoxlm_ds.config import Checkpoint

Job = Callable[[], Any]


@dataclass(frozen=True)
class Failed:
    """Stands for the result of a job that raised OSError."""

    why: str


@dataclass(frozen=True)
class Outcome:
    """The end of a save. `blocked`: seconds for which training stood still; `took`: seconds from start to end."""

    step: int
    problem: str  # empty: committed
    blocked: float
    took: float
    bytes: int


class Save:
    """A save in progress. Its stages are `_write`, `_read_back` and `_commit`, in this order.

    The first two are jobs: each rank runs its own, in a thread if the save is asynchronous, otherwise inside `advance`.
    The results of all ranks go to the next stage. If the disk fails one rank, all ranks know it and the folder is
    removed.
    """

    def __init__(self, store: Store, settings: Checkpoint, step: int, contents: Contents, started: float) -> None:
        """Start the first stage. Collective. `contents`: this rank's files; `started`: when the save began."""
        self._store, self._settings, self._step, self._started = store, settings, step, started
        self._threads = ThreadPoolExecutor(1, "checkpoint") if settings.asynchronous else None
        self._job: Job | None = None
        self._future: Future[Any] | None = None
        self._next_stage: Callable[[list[Any]], None]
        self._receipts: list[Receipt] = []  # of all ranks
        self._problem: str | None = None  # None until the save has ended
        self._write(contents)
        self._blocked = time.monotonic() - started

    @property
    def ready(self) -> bool:
        """Whether `advance` would not wait for this rank's thread."""
        return self._future is None or self._future.done()

    def advance(self) -> Outcome | None:
        """Finish the current job, gather the results of all ranks, start the next stage. Returns the outcome after the
        last stage. Collective."""
        entered = time.monotonic()
        if self._job is not None:
            results = dist.gather_objects(self._future.result() if self._future else _caught(self._job))
            self._job = self._future = None
            self._next_stage(results)
        left = time.monotonic()
        self._blocked += left - entered
        if self._problem is None:
            return None
        if self._threads is not None:
            self._threads.shutdown()
        size = sum(receipt.bytes for receipt in self._receipts)
        return Outcome(self._step, self._problem, self._blocked, left - self._started, size)

    def _start(self, job: Job, next_stage: Callable[[list[Any]], None]) -> None:
        self._job, self._next_stage = job, next_stage
        self._future = self._threads.submit(_caught, job) if self._threads is not None else None

    def _write(self, contents: Contents) -> None:
        """Each rank writes its files to the new folder. Only the job holds `contents`: it is the host's memory of an
        asynchronous save."""
        folder = on_first_rank(partial(self._store.begin, self._step))
        if isinstance(folder, Failed):
            self._problem = folder.why
        else:
            self._folder: Path = folder
            self._start(partial(write_files, folder, contents), self._read_back)

    def _read_back(self, written: list[Any]) -> None:
        """Each rank reads and verifies the files of the next rank."""
        if problem := _problems_of(written):
            self._commit(problem)
            return
        self._receipts = [receipt for of_rank in written for receipt in of_rank]
        neighbours = written[(dist.rank() + 1) % dist.world_size()]
        self._start(partial(_damage_of_files, self._folder, neighbours), self._commit_if_whole)

    def _commit_if_whole(self, damage: list[Any]) -> None:
        self._commit(_problems_of(damage) or "; ".join(filter(None, damage)))

    def _commit(self, problem: str) -> None:
        """Rank 0 commits the folder, or removes it if there was a problem."""
        if problem:
            self._receipts = []
        job = partial(_commit_or_remove, self._store, self._settings, self._folder, self._receipts, problem)
        committed = on_first_rank(job)
        self._problem = problem or _problems_of([committed])


def _damage_of_files(folder: Path, receipts: list[Receipt]) -> str:
    return "; ".join(filter(None, (receipt.damage(folder) for receipt in receipts)))


def _commit_or_remove(store: Store, settings: Checkpoint, folder: Path, receipts: list[Receipt], problem: str) -> None:
    on_disk, stated = {str(p.relative_to(folder)) for p in folder.rglob("*")}, {r.name for r in receipts}
    try:
        if problem:
            raise OSError(problem)
        if on_disk != stated or len(stated) < len(receipts):
            raise OSError(f"{folder} holds {sorted(on_disk)} where the ranks wrote {sorted(stated)}")
        store.point_to(store.publish(folder, receipts))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        store.prune(settings.keep, settings.keep_every)
    except OSError as error:  # the next save tries again
        print(f"an older checkpoint could not be removed: {error}", flush=True)


def on_first_rank(job: Job) -> Any:
    """Run a job on rank 0. Returns its result, or `Failed` if it raised OSError, on every rank. Collective."""
    return dist.from_first_rank(_caught(job) if dist.rank() == 0 else None)


def _caught(job: Job) -> Any:
    try:
        return job()
    except OSError as error:
        return Failed(f"rank {dist.rank()}: {error}")


def _problems_of(results: list[Any]) -> str:
    """Why jobs failed; empty if none did."""
    return "; ".join(result.why for result in results if isinstance(result, Failed))
