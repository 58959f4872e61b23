"""Writes files and folders as a whole or not at all: first as NAME.partial beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"


def write_file(path: Path, text: str, durable: bool = False, private: bool = False) -> None:
    """Write a text file. A reader sees the old text or the new one. If `durable`, the new text is on the disk after the
    call. If `private`, only the user may read it."""
    partial = path.with_name(path.name + SUFFIX)
    if private:
        partial.unlink(missing_ok=True)
        partial.touch(0o600)
    try:
        partial.write_text(text, encoding="utf-8")
        if durable:
            sync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write into and to seek in. At the end of the block it is renamed to `path`. If the block raises,
    it is removed."""
    partial = path.with_name(path.name + SUFFIX)
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to write into. At the end of the block it is renamed to `path`. If the block
    raises, it is removed."""
    partial = path.with_name(path.name + SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
