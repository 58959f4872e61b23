"""Why a run ended early: the rank that has a cause leaves it in `RUN/failures/`, the others, which only see a broken
connection, tell it.

A rank that was killed leaves nothing: it is known by its silence.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from infoxlm_ds import dist
from infoxlm_ds.config import UserError

WAIT = 5.0  # seconds that a rank gets to tell its cause
LOST = "lost"  # the cause of a rank whose only fault is that another is gone


@dataclass(frozen=True)
class Failure:
    rank: int
    cause: str
    code: int


def forget(run: Path) -> None:
    """Of an earlier start."""
    shutil.rmtree(run / "failures", ignore_errors=True)


def end(error: Exception, run: Path, where: Sequence[str], newest: str) -> int:
    """Say on the screen why this rank, or another, ends the run. Returns the exit code.

    `where`: host and process of each rank. `newest`: what to go on from.
    """
    if dist.is_broken(error):
        return _tell_of_others(error, run, where, newest)
    if isinstance(error, UserError):  # which only its rank knows of, such as a damaged pack
        return _tell(run, str(error), 2)
    if isinstance(error, OSError):  # the disk, mostly
        return _tell(run, f"{type(error).__name__}: {error}", 1)
    if isinstance(error, dist.AllRanksError):
        if dist.rank() == 0:
            print(f"infoxlm: {error}", file=sys.stderr, flush=True)
        return 1
    traceback.print_exception(error)
    return _tell(run, f"{type(error).__name__}: {error}", 1)


def _tell(run: Path, cause: str, code: int) -> int:
    print(f"infoxlm: rank {dist.rank()}: {cause}", file=sys.stderr, flush=True)
    _leave(run, Failure(dist.rank(), cause, code))
    return code


def _tell_of_others(error: Exception, run: Path, where: Sequence[str], newest: str) -> int:
    _leave(run, Failure(dist.rank(), LOST, 1))
    deadline = time.monotonic() + WAIT
    while len(found := _read(run)) < len(where) and time.monotonic() < deadline:
        time.sleep(0.5)
    causes = [f for f in found if f.cause != LOST]
    silent = sorted(set(range(len(where))) - {f.rank for f in found} - {dist.rank()})
    if dist.rank() == min((f.rank for f in found if f.cause == LOST), default=dist.rank()):  # one line, whoever is left
        why = [f"rank {f.rank} failed: {f.cause}" for f in causes]
        why += [f"rank {rank} ({where[rank]}) {_fate(error)}" for rank in silent]
        print(f"infoxlm: {'; '.join(why) or error}. {newest}", file=sys.stderr, flush=True)
    return max((f.code for f in causes), default=1)


def _fate(error: Exception) -> str:
    if "timed out" in str(error).lower():
        return "does not answer (timeout.step says how long to wait): it hangs, or its host does"
    return "is gone without a word: killed, perhaps for memory (the kernel's log there tells)"


def _leave(run: Path, failure: Failure) -> None:
    folder = run / "failures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{failure.rank:05d}.json"
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        unfinished.replace(path)
    except OSError:  # a full disk: then the screen has to do
        pass


def _read(run: Path) -> list[Failure]:
    return [Failure(**json.loads(p.read_text(encoding="utf-8"))) for p in (run / "failures").glob("rank-*.json")]


def place() -> str:
    """Host and process of this rank."""
    return f"process {os.getpid()} on {socket.gethostname()}"
