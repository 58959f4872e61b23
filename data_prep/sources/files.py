"""Finds and opens the files of a source: local ones, and URLs through fsspec; plain and compressed."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import zstandard

from data_prep.rows import Block, Part
from infoxlm_ds.config import UserError

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
# What a damaged file raises when it is decompressed.
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, zstandard.ZstdError)


def find(path: str, base: Path) -> list[str]:
    """The files that a path of a description names, by name: paths or URLs. UserError if there is none."""
    try:
        files = _find_remote(path) if "://" in path else _find_local(str(base / path))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path}: cannot be read: {_short(error)}") from None
    if not files:
        raise UserError(f"{path}: no such file: correct the path in the corpus description")
    return files


def _find_local(path: str) -> list[str]:
    if Path(path).is_file():
        return [path]
    pattern = f"{glob.escape(path)}/*" if Path(path).is_dir() else path
    # Path.glob takes no absolute pattern, and finds hidden files.
    return sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207


def _find_remote(url: str) -> list[str]:
    system, path = _remote(url)
    try:
        if "*" in path:
            names = system.glob(path)
        elif system.isdir(path):
            names = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]
        else:
            names = [path] if system.exists(path) else []
    except Exception as error:  # the packages of protocols raise exceptions of their own
        raise UserError(f"{url}: cannot be read: {_short(error)}") from None
    return sorted(system.unstrip_protocol(name) for name in names)


def _remote(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: a package for this protocol is missing: {_short(error)}") from None
    except Exception as error:
        raise UserError(f"{url}: not a URL that can be read: {_short(error)}") from None


def size_of(file: str) -> int:
    """The stored bytes of a path or URL. UserError if its server does not tell."""
    with raw(file) as opened:
        try:
            return opened.seek(0, os.SEEK_END)
        except (OSError, ValueError):  # ValueError: fsspec, for a server that only streams
            raise UserError(f"{file}: its server does not tell its size: download the file") from None


@contextmanager
def raw(file: str) -> Iterator[IO[bytes]]:
    """The stored bytes of a path or URL. UserError if it cannot be opened."""
    try:
        opened = _open(file)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: correct the path in the corpus description") from None
    except Exception as error:  # the packages of protocols raise exceptions of their own
        raise UserError(f"{file}: cannot be opened: {_short(error)}") from None
    with opened:
        yield opened


def _open(file: str) -> IO[bytes]:
    if "://" not in file:
        return Path(file).open("rb")
    system, path = _remote(file)
    return system.open(path, "rb")


@contextmanager
def plain(part: Part) -> Iterator[io.BufferedIOBase]:
    """The bytes of a part, decompressed if the file is compressed."""
    with raw(part.file) as stored:
        if is_compressed(part.file):
            yield _decompressed(part.file, stored)
        else:
            stored.seek(part.start)
            yield io.BufferedReader(_Range(stored, part.end - part.start), 2**20)


def whole(file: str) -> Part:
    """All of a file."""
    return Part(file, 0, size_of(file))


def one_block_each(path: str | None, base: Path) -> Iterator[Block]:
    """A block for each file that the path of a source names."""
    assert path is not None
    for file in find(path, base):
        yield Block((whole(file),))


def is_compressed(file: str) -> bool:
    """Whether a file is compressed, by its name."""
    return file.endswith(COMPRESSED)


def damage(file: str, error: Exception) -> UserError:
    """What to say of a file whose rest is lost. `file` may go on with a place in it."""
    return UserError(f"{file}: cannot be read: {_short(error)}: replace the file")


def _short(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text if len(text) < 200 else text[:200] + " ..."


def _decompressed(file: str, stored: IO[bytes]) -> io.BufferedIOBase:
    if file.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)
    if file.endswith(".xz"):
        return lzma.LZMAFile(stored)
    if file.endswith(".bz2"):
        return bz2.BZ2File(stored)
    return io.BufferedReader(_Zstandard(stored), 2**20)


class _Range(io.RawIOBase):
    """The next `left` bytes of a file."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self.file, self.left = file, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


class _Zstandard(io.RawIOBase):
    """A file of zstandard frames. zstandard's own reader takes a file that was cut for one that ends."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.ready = file, memoryview(b"")
        self.frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            # A byte may stand for 30,000: few are read at a time, so that memory stays small.
            data = self.file.read(1024)
            if not data:
                if self.frame is not None:
                    raise EOFError("the compressed file ends too early")
                return 0
            self.ready = memoryview(b"".join(self._frames(data)))
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def _frames(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            yield self.frame.decompress(data)
            if not self.frame.eof:
                return
            data, self.frame = self.frame.unused_data, None
