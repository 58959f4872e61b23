"""The files of a corpus: their names, sizes and hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from infoxlm_ds.config import Section, UserError


class File(Section):
    """A file of a corpus: its name, size and hash when it was written."""

    name: str  # relative to the corpus
    bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The path of a name that a file of ours states. UserError if it leads out of the folder, also by a link."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} leads out of {folder}: files of other places are not read; copy it there")
    return path
