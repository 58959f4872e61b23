"""Copies of a server's files in a folder of this host, for all its processes.

corpora/MANIFEST'S SHA256/   indices, tokenizers: small, kept for ever
shards/SHA256.tar            whole shards, only if INFOXLM_CACHE_GB is set; the longest unused go first
lock                         held while one process fetches a file
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infoxlm_ds.atomic import SUFFIX
from infoxlm_ds.config import UserError
from infoxlm_ds.data.files import File, inside, sha256_of

Fetch = Callable[[File], Iterable[bytes]]  # gives a file in pieces


class Cache:
    """At most `limit` bytes of shards in `folder`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit

    @staticmethod
    def of_environment() -> Cache:
        """The folder INFOXLM_CACHE, and INFOXLM_CACHE_GB for shards. UserError if that is no number."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        stated = os.environ.get("INFOXLM_CACHE_GB") or "0"
        try:
            gigabytes = float(stated)
        except ValueError:
            gigabytes = math.nan
        if not 0 <= gigabytes < 1e9:
            raise UserError(f"INFOXLM_CACHE_GB is {stated!r}: set it to a number of gigabytes, such as 200")
        return Cache(Path(os.environ.get("INFOXLM_CACHE") or Path(home, "infoxlm")), int(gigabytes * 1e9))

    def folder(self, key: str) -> Path:
        """The folder of the small files of a corpus."""
        return self._folder / "corpora" / key

    def copy(self, file: File, folder: Path, fetch: Fetch, url: str) -> Path:
        """The path of a small file's copy in the folder of its corpus. It has the right hash."""
        path = inside(folder, file.name)
        with self._locked():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or sha256_of(path) != file.sha256:
                _fetch(file, path, fetch, url)
        return path

    def shard(self, file: File, start: int, size: int, fetch: Fetch, url: str) -> bytes | None:
        """A part of a shard's copy; None if shards are not kept here, or not such large ones."""
        if file.bytes > self._limit:
            return None
        path = self._shard(file)
        for _ in range(3):
            try:
                with path.open("rb") as kept:
                    os.utime(path)  # the time of the last use
                    kept.seek(start)
                    return kept.read(size)
            except (FileNotFoundError, NotADirectoryError):  # not here yet, or another process has just made room
                self._keep(file, path, fetch, url)
        return None  # others make room faster than this process reads

    def forget(self, file: File) -> None:
        """Remove a shard's copy that is damaged."""
        if file.bytes <= self._limit:
            with self._locked():
                self._shard(file).unlink(missing_ok=True)

    def _shard(self, file: File) -> Path:
        return inside(self._folder / "shards", f"{file.sha256}.tar")

    def _keep(self, file: File, path: Path, fetch: Fetch, url: str) -> None:
        with self._locked():
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._make_room(path.parent, file.bytes)
                _fetch(file, path, fetch, url)

    def _make_room(self, folder: Path, needed: int) -> None:
        """Remove the shards that were not used for the longest time, and what a killed process left."""
        for left in folder.glob(f"*{SUFFIX}"):
            left.unlink()
        kept = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.tar"))
        total = sum(size for _, size, _ in kept)
        for _, size, path in kept:
            if total + needed <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder: of the processes on this host, one fetches a file and the others wait for it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: files of a server cannot be kept here: {error.strerror}: free some space, or set "
                "INFOXLM_CACHE to a folder on a disk of this host"
            ) from None


def _fetch(file: File, path: Path, fetch: Fetch, url: str) -> None:
    """Write a file as a whole or not at all. UserError if its bytes are wrong twice: once may be the network's
    fault."""
    partial = path.with_name(path.name + SUFFIX)
    for _ in range(2):
        digest = hashlib.sha256()
        with partial.open("wb") as out:
            for piece in fetch(file):
                digest.update(piece)
                out.write(piece)
        if digest.hexdigest() == file.sha256:
            partial.replace(path)
            return
    partial.unlink()
    raise UserError(f"{url} is damaged: upload it again; `infoxlm prep verify` checks all files")
