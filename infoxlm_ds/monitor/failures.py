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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from infoxlm_ds import dist
from infoxlm_ds.config import UserError

WAIT = 5.0  # seconds that a rank gets to tell its cause


class Place(NamedTuple):
    host: str
    process: int


@dataclass(frozen=True)
class Failure:
    rank: int
    cause: str
    code: int


@dataclass(frozen=True)
class _Reports:
    """Ranks whose only fault is that they lost others, and failures with a cause."""

    lost: frozenset[int]
    causes: tuple[Failure, ...]

    def silent(self, world: int) -> list[int]:
        return sorted(set(range(world)) - self.lost - {f.rank for f in self.causes} - {dist.rank()})


def here() -> Place:
    """Host and process of this rank."""
    return Place(socket.gethostname(), os.getpid())


def forget(run: Path) -> None:
    """Of an earlier start."""
    shutil.rmtree(run / "failures", ignore_errors=True)


def end(error: Exception, run: Path, where: Sequence[Place], newest: str) -> int:
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
    _leave(run, ".json", json.dumps(asdict(Failure(dist.rank(), cause, code))))
    return code


def _tell_of_others(error: Exception, run: Path, where: Sequence[Place], newest: str) -> int:
    _leave(run, ".lost", "")
    deadline = time.monotonic() + WAIT
    while (reports := _read(run)).silent(len(where)) and time.monotonic() < deadline:
        time.sleep(0.5)
    silent = reports.silent(len(where))
    why = [f"rank {f.rank} failed: {f.cause}" for f in reports.causes]
    why += [f"{names} {_fate(error)}" for names in _names(silent, where)]
    hosts = sorted({place.host for place in where})
    if not why and len(hosts) > 1:
        why = [f"all ranks are alive and lost each other: the network between {', '.join(hosts)} is broken"]
    # One line, whoever is left; where hosts lost each other, one of each, for one may be cut off from the screen.
    tellers = reports.lost | {dist.rank()}
    if not reports.causes and not silent:
        tellers = frozenset(rank for rank in tellers if where[rank].host == where[dist.rank()].host)
    if dist.rank() == min(tellers):
        print(f"infoxlm: {'; '.join(why) or error}. {newest}", file=sys.stderr, flush=True)
    return max((f.code for f in reports.causes), default=1)


def _names(ranks: Sequence[int], where: Sequence[Place]) -> Iterable[str]:
    """Each rank with its place; a host that lost all of its several ranks by its own name."""
    for host in dict.fromkeys(where[rank].host for rank in ranks):
        there = [rank for rank in ranks if where[rank].host == host]
        if len(there) > 1 and len(there) == sum(place.host == host for place in where):
            yield f"all of {host} (ranks {', '.join(map(str, there))})"
        else:
            yield from (f"rank {rank} (process {where[rank].process} on {host})" for rank in there)


def _fate(error: Exception) -> str:
    if "timed out" in str(error).lower():
        return "does not answer (timeout.step says how long to wait): it hangs, or its host does"
    return "is gone without a word: killed, perhaps for memory (the kernel's log there tells)"


def _leave(run: Path, kind: str, text: str) -> None:
    folder = run / "failures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{dist.rank():05d}{kind}"
        unfinished = path.with_suffix(".new")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError:  # a full disk: then the screen has to do
        pass


def _read(run: Path) -> _Reports:
    """With thousands of ranks, all that look read names alone, and the few causes."""
    try:
        paths = list((run / "failures").iterdir())
    except OSError:
        paths = []
    lost = frozenset(int(path.stem.removeprefix("rank-")) for path in paths if path.suffix == ".lost")
    causes = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in paths if path.suffix == ".json"]
    return _Reports(lost, tuple(sorted(causes, key=lambda failure: failure.rank)))
