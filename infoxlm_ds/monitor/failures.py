"""Reports why a run ended early.

A rank that fails writes the cause to `RUN/failures/`. The others only see a broken connection: they read the causes,
and one of them prints the message. A killed rank writes nothing: the others conclude that it is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from infoxlm_ds import dist
from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.trouble import complain

WAIT = 5.0  # seconds that a rank has to write its cause
MESSAGE = 2**16  # bytes of disk that a cause needs, at most


class Place(NamedTuple):
    """Where a rank runs: its host, and the number of its process there."""

    host: str
    process: int


@dataclass(frozen=True)
class Failure:
    """Why a rank ended, and with which exit code."""

    rank: int
    cause: str
    code: int


@dataclass(frozen=True)
class _Reports:
    """What the ranks wrote. `lost`: ranks that only lost the connection to others; `causes`: failures with a cause."""

    lost: frozenset[int]
    causes: tuple[Failure, ...]

    def silent(self, world: int) -> list[int]:
        """Other ranks that wrote nothing."""
        return sorted(set(range(world)) - self.lost - {f.rank for f in self.causes} - {dist.rank()})


def here() -> Place:
    """Host and process of this rank."""
    return Place(socket.gethostname(), os.getpid())


def forget(run: Path) -> None:
    """Remove the failures of an earlier start."""
    shutil.rmtree(run / "failures", ignore_errors=True)


def causes(run: Path) -> tuple[Failure, ...]:
    """What the ranks of the last start wrote before they ended."""
    return _read(run).causes


def end(error: Exception, run: Path, where: Sequence[Place], newest: str) -> int:
    """Print why this rank, or another, ends the run. Returns the exit code.

    `where`: host and process of each rank. `newest`: a sentence about the newest checkpoint.
    """
    if dist.is_broken(error):
        return _tell_of_others(error, run, where, newest)
    if isinstance(error, UserError):  # only this rank knows it, such as a damaged pack of rows
        return _tell(run, str(error), 2)
    if isinstance(error, OSError):  # usually the disk
        return _tell(run, f"{type(error).__name__}: {error}", 1)
    if isinstance(error, dist.AllRanksError):
        if dist.rank() == 0:
            complain(str(error))
        return 1
    traceback.print_exception(error)
    return _tell(run, f"{type(error).__name__}: {error}", 1)


def _tell(run: Path, cause: str, code: int) -> int:
    complain(f"rank {dist.rank()}: {cause}")
    _leave(run, ".json", json.dumps(asdict(Failure(dist.rank(), cause, code))))
    return code


def _tell_of_others(error: Exception, run: Path, where: Sequence[Place], newest: str) -> int:
    _leave(run, ".lost", "")
    deadline = time.monotonic() + WAIT
    while (reports := _read(run)).silent(len(where)) and time.monotonic() < deadline:
        time.sleep(0.5)
    silent = reports.silent(len(where))
    why = [f"rank {f.rank} failed: {f.cause}" for f in reports.causes]
    why += [f"{names} {_fate(error, run)}" for names in _names(silent, where)]
    hosts = sorted({place.host for place in where})
    if not why and len(hosts) > 1:
        why = [f"all ranks are alive but lost each other: the network between {', '.join(hosts)} is broken"]
    # One rank prints one line. If hosts lost each other, one rank of each host does: the user may see one host only.
    tellers = reports.lost | {dist.rank()}
    if not reports.causes and not silent:
        tellers = frozenset(rank for rank in tellers if where[rank].host == where[dist.rank()].host)
    if dist.rank() == min(tellers):
        complain(f"{'; '.join(why) or error}. {newest}")
    return max((f.code for f in reports.causes), default=1)


def _names(ranks: Sequence[int], where: Sequence[Place]) -> Iterable[str]:
    """Names of ranks, with process and host. If a host lost all of its several ranks, its own name is used."""
    for host in dict.fromkeys(where[rank].host for rank in ranks):
        of_host = [rank for rank in ranks if where[rank].host == host]
        if len(of_host) > 1 and len(of_host) == sum(place.host == host for place in where):
            yield f"all of {host} (ranks {', '.join(map(str, of_host))})"
        else:
            yield from (f"rank {rank} (process {where[rank].process} on {host})" for rank in of_host)


def _fate(error: Exception, run: Path) -> str:
    if "timed out" in str(error).lower():
        return "does not answer (timeout.step sets how long to wait): the rank or its host hangs"
    if run.is_dir() and shutil.disk_usage(run).free < MESSAGE:
        return f"is gone without a message: there is no space for one, because the disk of {run} is full"
    return "is gone without a message: it was killed (if memory ran out, the kernel's log on that host says so)"


def _leave(run: Path, kind: str, text: str) -> None:
    folder = run / "failures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"rank-{dist.rank():05d}{kind}", text)
    except OSError:  # the disk is full: then only the screen shows the cause
        pass


def _read(run: Path) -> _Reports:
    """Read what the ranks wrote. Thousands of ranks may do this at once, so they open only the few causes."""
    try:
        paths = list((run / "failures").iterdir())
    except OSError:
        paths = []
    lost = frozenset(int(path.stem.removeprefix("rank-")) for path in paths if path.suffix == ".lost")
    causes = [cause for path in paths if path.suffix == ".json" and (cause := _cause(path)) is not None]
    return _Reports(lost, tuple(sorted(causes, key=lambda failure: failure.rank)))


def _cause(path: Path) -> Failure | None:
    """What a rank wrote; None if it cannot be read."""
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
