"""One save: every rank writes its files, another reads them back, and only then rank 0 gives the folder its name and
points `latest` at it.

`commit_protocol` says so from top to bottom. `Save` runs it: at once, or in a thread and at step boundaries.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
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
# Yields a job a rank, is sent the results of all; at its end: what went wrong, if anything, and the bytes written.
Protocol = Generator[Job, Any, tuple[str, int]]


@dataclass(frozen=True)
class Failed:
    """In place of a job's result."""

    why: str


@dataclass(frozen=True)
class Outcome:
    """What came of a save. `blocked`: seconds in which training stood still for it; `took`: from its start to its
    end."""

    step: int
    problem: str  # empty: committed
    blocked: float
    took: float
    bytes: int


def commit_protocol(store: Store, settings: Checkpoint, step: int, contents: Contents) -> Protocol:
    """`contents`: this rank's files. What the disk refuses one rank is known to all, and leaves nothing behind."""
    folder = on_first_rank(partial(store.begin, step))
    if isinstance(folder, Failed):
        return folder.why, 0
    written = yield partial(write_files, folder, contents)
    del contents  # of an asynchronous save, the host's memory
    if not (why := _why(written)):
        neighbour = written[(dist.rank() + 1) % dist.world_size()]  # on another host, where there are more
        verdicts = yield lambda: "; ".join(filter(None, (receipt.damage(folder) for receipt in neighbour)))
        why = _why(verdicts) or "; ".join(filter(None, verdicts))
    receipts = [] if why else [receipt for of_rank in written for receipt in of_rank]
    committed = on_first_rank(partial(_commit, store, settings, folder, receipts, why))
    return why or _why([committed]), sum(receipt.bytes for receipt in receipts)


def _commit(store: Store, settings: Checkpoint, folder: Path, receipts: list[Receipt], why: str) -> None:
    """Rank 0's last word: the folder counts, or is gone."""
    on_disk, stated = {str(p.relative_to(folder)) for p in folder.rglob("*")}, {r.name for r in receipts}
    try:
        if why:
            raise OSError(why)
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


class Save:
    """A save under way: its protocol, and the job in hand, which runs in a thread or when it is asked for."""

    def __init__(self, step: int, protocol: Protocol, threaded: bool, started: float) -> None:
        self._step, self._protocol, self._started = step, protocol, started
        self._threads = ThreadPoolExecutor(1, "checkpoint") if threaded else None
        self._job: Job | None = None
        self._future: Future[Any] | None = None
        self._end: tuple[str, int] | None = None
        self._resume(None)
        self._blocked = time.monotonic() - started

    @property
    def ready(self) -> bool:
        """Whether `advance` would not wait for this rank's thread."""
        return self._future is None or self._future.done()

    def advance(self) -> Outcome | None:
        """Finish the job in hand, exchange results, start the next. Collective."""
        at = time.monotonic()
        if self._job is not None:
            self._resume(dist.gather_objects(self._future.result() if self._future else _caught(self._job)))
        now = time.monotonic()
        self._blocked += now - at
        if self._end is None:
            return None
        if self._threads is not None:
            self._threads.shutdown()
        return Outcome(self._step, self._end[0], self._blocked, now - self._started, self._end[1])

    def _resume(self, results: list[Any] | None) -> None:
        self._job = self._future = None
        try:
            self._job = self._protocol.send(results)
        except StopIteration as end:
            self._end = end.value
        else:
            self._future = self._threads.submit(_caught, self._job) if self._threads is not None else None


def on_first_rank(job: Job) -> Any:
    """What a job of rank 0's returns, or that the disk failed it, on every rank. Collective."""
    return dist.from_first_rank(_caught(job) if dist.rank() == 0 else None)


def _caught(job: Job) -> Any:
    try:
        return job()
    except OSError as error:
        return Failed(f"rank {dist.rank()}: {error}")


def _why(results: list[Any]) -> str:
    """What went wrong with jobs, if anything."""
    return "; ".join(result.why for result in results if isinstance(result, Failed))
