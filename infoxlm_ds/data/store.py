"""Where a corpus lies: in a folder, or on a server (HTTP, S3, GCS, Azure). Both have the same functions. Packs are read
by byte range, and each one's length and checksum are tested.

A server's small files are copied to a folder of this host, see `cache.py`; so are whole shards, if wished.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from infoxlm_ds.config import Place, UserError
from infoxlm_ds.data.cache import Cache
from infoxlm_ds.data.files import File, inside

WAITS = (0.5, 1, 2, 4, 8, 16)  # seconds before a failed request is sent again, less a random part of up to a half
THREADS = 16
NEAR = 2**18  # bytes: ranges with a smaller gap are read by one request, which costs about as much time
PIECE = 2**24  # bytes of a request, at most
AT_ONCE = 4  # pieces of a whole file
RESTORE = "restore the file or prepare the corpus again"
UPLOAD = "upload it again; `infoxlm prep verify` checks all files"
T = TypeVar("T")
_chance = random.Random()  # hosts must not ask again all at the same time


class Range(NamedTuple):
    """The place of a pack: `size` bytes from `offset` on, with a checksum."""

    file: File
    offset: int
    size: int
    crc32: int

    def is_right(self, data: bytes) -> bool:
        """Whether these are the bytes that were written."""
        return len(data) == self.size and zlib.crc32(data) == self.crc32


class DamagedPack(UserError):
    """The bytes of a pack are not those that were written, or the disk cannot read them."""


class Folder:
    """A corpus in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def where(self, name: str) -> Path:
        """The path of a file of the corpus."""
        return self._path / name

    def whole(self, name: str) -> bytes | None:
        """A file's bytes, None if there is no such file."""
        try:
            return (self._path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def check(self, files: Iterable[File]) -> None:
        """UserError if a file is missing, lies elsewhere or has another size."""
        for file in files:
            path = inside(self._path, file.name)
            if not path.is_file():
                raise UserError(f"{path} is missing: {RESTORE}")
            _check_size(path, path.stat().st_size, file)

    def copy(self, file: File, key: str) -> Path:
        """The path of a small file on this host."""
        return self.folder(key) / file.name

    def folder(self, key: str) -> Path:
        """The folder of the paths that `copy` gives."""
        return self._path

    def read(self, wanted: Range) -> bytes:
        """The bytes of a pack. DamagedPack if they are not those that were written."""
        return read_range(self._path / wanted.file.name, wanted)

    def ahead(self, wanted: Iterable[Range]) -> list[Future[dict[int, bytes]]]:
        """Nothing: the system reads files ahead."""
        return []


def read_range(path: Path, wanted: Range) -> bytes:
    """The bytes of a pack in a local shard. DamagedPack if they are not those that were written."""
    try:
        with path.open("rb") as file:
            file.seek(wanted.offset)
            data = file.read(wanted.size)
    except OSError as error:
        raise DamagedPack(f"{path}: cannot be read: {error.strerror}; {RESTORE}") from None
    if not wanted.is_right(data):
        raise DamagedPack(f"{path}: the pack at byte {wanted.offset} is damaged: {RESTORE}")
    return data


class Server:
    """A corpus under a URL. A request that fails is sent again a few times, with growing waits."""

    def __init__(self, url: str) -> None:
        self._url, self._cache = url, Cache.of_environment()
        self._remote, self._errors = _connect(url)
        self._pool = ThreadPoolExecutor(THREADS, "reader")
        self._coming: WeakValueDictionary[tuple[str, int], Future[dict[int, bytes]]] = WeakValueDictionary()

    def where(self, name: str) -> str:
        """The URL of a file of the corpus."""
        return f"{self._url}/{_plain(name)}"

    def whole(self, name: str) -> bytes | None:
        """A file's bytes, None if there is no such file."""
        try:
            return self._retried(name, "", lambda: bytes(self._remote.get(name).bytes()))
        except FileNotFoundError:
            return None

    def check(self, files: Iterable[File]) -> None:
        """UserError if a file is missing or has another size, or if the server cannot send a part of a file."""
        listed = list(files)
        for file, size in zip(listed, self._pool.map(self._size, listed), strict=True):
            _check_size(self.where(file.name), size, file)
        for file in listed[:1]:
            self._range(file, 0, min(1, file.bytes))

    def _size(self, file: File) -> int:
        return int(self._present(file, "", lambda: self._remote.head(file.name)["size"]))

    def sha256(self, file: File) -> str:
        """The hash of a file's bytes, all of which are read."""
        digest = hashlib.sha256()
        for piece in self._pieces(file):
            digest.update(piece)
        return digest.hexdigest()

    def copy(self, file: File, key: str) -> Path:
        """The path of a copy of a small file on this host, with the right hash. `key`: of the corpus."""
        return self._cache.copy(file, self.folder(key), self._pieces, self.where(file.name))

    def folder(self, key: str) -> Path:
        """The folder of the paths that `copy` gives."""
        return self._cache.folder(key)

    def read(self, wanted: Range) -> bytes:
        """The bytes of a pack. DamagedPack if they are not those that were written, UserError if none come."""
        coming = self._coming.get((wanted.file.name, wanted.offset))
        if coming is None or coming.exception():  # the server may have recovered since then
            return self._read([wanted])[wanted.offset]
        return coming.result()[wanted.offset]

    def ahead(self, wanted: Iterable[Range]) -> list[Future[dict[int, bytes]]]:
        """Begin to read packs. `read` waits for them. They are kept as long as the caller keeps the result."""
        held, new = [], []
        for r in wanted:
            coming = self._coming.get((r.file.name, r.offset))
            held += [coming] if coming else []
            new += [] if coming else [r]
        for group in _joined(new):
            held.append(self._pool.submit(self._read, group))
            for r in group:
                self._coming[r.file.name, r.offset] = held[-1]
        return held

    def _read(self, group: list[Range]) -> dict[int, bytes]:
        """Read packs of a shard that lie near each other. If one is damaged, read again: the network or the copy on
        this host may have done it."""
        file, start = group[0].file, group[0].offset
        size = max(r.offset + r.size for r in group) - start
        for _ in range(2):
            data = self._bytes(file, start, size)
            packs = {r.offset: data[r.offset - start : r.offset - start + r.size] for r in group}
            damaged = [r for r in group if not r.is_right(packs[r.offset])]
            if not damaged:
                return packs
            self._cache.forget(file)
        part = _bytes_named(damaged[0].offset, damaged[0].size)
        problem = f"the pack in {part} is damaged, also when it is read again"
        raise DamagedPack(f"{self.where(file.name)}: {problem}: {UPLOAD}")

    def _bytes(self, file: File, start: int, size: int) -> bytes:
        kept = self._cache.shard(file, start, size, self._pieces, self.where(file.name))
        return self._range(file, start, size) if kept is None else kept

    def _range(self, file: File, start: int, size: int) -> bytes:
        def request() -> bytes:
            data = bytes(self._remote.get_range(file.name, start=start, length=size))
            if len(data) != size:
                raise _Short(f"only {len(data)} of {size} bytes came")
            return data

        return self._present(file, _bytes_named(start, size), request) if size else b""

    def _pieces(self, file: File) -> Iterator[bytes]:
        """A whole file, piece by piece. A few are read at once."""
        starts = range(0, file.bytes, PIECE)
        with ThreadPoolExecutor(AT_ONCE) as pool:  # not the other one, whose threads wait here for the cache
            for i in range(0, len(starts), AT_ONCE):
                part = starts[i : i + AT_ONCE]
                yield from pool.map(lambda start: self._range(file, start, min(PIECE, file.bytes - start)), part)

    def _present(self, file: File, part: str, request: Callable[[], T]) -> T:
        try:
            return self._retried(file.name, part, request)
        except FileNotFoundError:
            raise UserError(f"{self.where(file.name)} is missing: {UPLOAD}") from None

    def _retried(self, name: str, part: str, request: Callable[[], T]) -> T:
        """What a request gives. FileNotFoundError if there is no such file, UserError if all tries fail."""
        what = f"{self.where(name)}: {part or 'the file'}"
        for wait in (*WAITS, None):
            try:
                return request()
            except self._errors.NotSupportedError:
                raise UserError(
                    f"{what} cannot be read: the server sends only whole files (it ignores Range): use another server, "
                    "or copy the corpus to a folder"
                ) from None
            except (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError) as error:
                raise UserError(f"{what} may not be read: {_first_line(error)}: set the server's credentials") from None
            except (self._errors.BaseError, _Short) as error:
                problem = error
            if wait is not None:
                time.sleep(wait * _chance.uniform(0.5, 1))
        raise UserError(
            f"{what} cannot be read in {len(WAITS) + 1} tries: {_first_line(problem)}: "
            "check the network and the server, then start again"
        )


class _Short(Exception):
    """Fewer bytes came than were asked for."""


Store = Folder | Server


def open_store(place: Place) -> Store:
    """The corpus of a folder or a URL. UserError if a package for URLs is missing."""
    return Server(place) if isinstance(place, str) else Folder(place)


def _connect(url: str) -> tuple[Any, Any]:
    """obstore's connection and its exceptions. It sends nothing again: we do."""
    try:
        from obstore import exceptions
        from obstore.store import from_url
    except ImportError:
        raise UserError(f"{url}: URLs need one more package: pip install 'infoxlm-ds[remote]'") from None
    # Options given here would replace those of the environment, such as AWS_ALLOW_HTTP.
    options = {"client_options": {"allow_http": True}} if url.startswith("http://") else {}
    try:
        return from_url(url, retry_config={"max_retries": 0}, **options), exceptions
    except (exceptions.BaseError, ValueError) as error:
        raise UserError(f"{url}: no address of a corpus: {_first_line(error)}") from None


def _joined(wanted: Iterable[Range]) -> Iterator[list[Range]]:
    """Groups of ranges that lie near each other in a shard."""
    for _, of_shard in groupby(sorted(set(wanted), key=lambda r: (r.file.name, r.offset)), key=lambda r: r.file.name):
        group: list[Range] = []
        for r in of_shard:
            far = group and r.offset - (group[-1].offset + group[-1].size) > NEAR
            if far or (group and r.offset + r.size - group[0].offset > PIECE):
                yield group
                group = []
            group.append(r)
        yield group


def _plain(name: str) -> str:
    """A name that a manifest states. UserError if it could lead out of the corpus."""
    if name.startswith("/") or re.search(r"(^|/)\.\.?(/|$)|//|[:\\]", name):
        raise UserError(f"{name!r}: the manifest names a file outside the corpus: files of other places are not read")
    return name


def _check_size(where: Path | str, size: int, file: File) -> None:
    if size != file.bytes:
        raise UserError(f"{where} has {size} bytes, not {file.bytes}: {RESTORE}")


def _bytes_named(start: int, size: int) -> str:
    return f"bytes {start}-{start + size - 1}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
