"""The work folder of a long search: texts and vectors on disk, so that memory stays small and a killed run goes on.

Legend: n different texts, D width.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.data.files import sha256_of
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.evaluation.progress import blocks
from infoxlm_ds.model.checksums import CHECKSUMS

CHUNK = 8192  # texts that are embedded before their vectors are on disk
Halves = npt.NDArray[np.float16]


class Embedder(Protocol):
    """Embeds sentences, as `SentenceEmbedder` does."""

    width: int

    def embed(self, sentences: list[str], *, description: str = ...) -> Vectors:
        """L2-normalised vectors [V, n, D] of V views, of which the first is used."""


class Texts:
    """Different texts in a file, in the order in which they were first added."""

    def __init__(self, path: Path, ends: Sequence[int]) -> None:
        self._path, self._ends = path, np.array([0, *ends], np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, part: slice) -> list[str]:
        """Consecutive texts."""
        return list(self.at(range(part.start, part.stop)))

    def at(self, numbers: Iterable[int]) -> Iterator[str]:
        """The texts of these numbers, one by one."""
        with self._path.open("rb") as file:
            for number in numbers:
                file.seek(int(self._ends[number]))
                yield file.read(int(self._ends[number + 1] - self._ends[number]) - 1).decode()


class TextWriter:
    """Collects different texts in a file. In memory are 16 bytes of hash and a number for each."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._ends = path, path.open("wb"), array("q")
        self._numbers: dict[bytes, int] = {}
        self._size = 0

    def add(self, text: str, same: int | None = None) -> int:
        """The number of a text; equal texts have the same. With `same`, those are equal that have the same of it."""
        written = text.encode()
        compared = written if same is None else str(same).encode()
        number = self._numbers.setdefault(blake2b(compared, digest_size=16).digest(), len(self._ends))
        if number == len(self._ends):
            self._size += self._file.write(written + b"\n")
            self._ends.append(self._size)
        return number

    def close(self) -> Texts:
        """The texts that were added. No more can be."""
        self._file.close()
        self._numbers.clear()
        return Texts(self._path, self._ends)


def embed_texts(embedder: Embedder, texts: Texts, path: Path, what: str) -> Halves:
    """L2-normalised vectors [n, D] of all texts, rounded to fp16, in a memory-mapped .npy file. What an earlier run has
    embedded is in the file already, and PATH.done says how many those are."""
    note = path.with_name(path.name + ".done")
    done = int(note.read_text()) if note.is_file() else 0
    if not done:
        np.lib.format.open_memmap(path, "w+", np.float16, (len(texts), embedder.width)).flush()
    vectors = np.lib.format.open_memmap(path, "r+")
    for part in blocks(len(texts), CHUNK, f"embedding {what}", done):
        vectors[part] = embedder.embed(texts.read(part), description="")[0]
        vectors.flush()
        write_file(note, str(part.stop))
    return vectors


@contextmanager
def work_folder(out: Path, model: Path, inputs: Sequence[Path]) -> Iterator[Path]:
    """OUT.work, which stays if the block raises after something was embedded. A later run of the same model and inputs
    gets it again. UserError if it is of others, if `out` is a folder or one of the inputs, or if no file can be written
    there."""
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the file to write")
    if out.exists() and any(out.samefile(path) for path in inputs):
        raise UserError(f"{out} is read and would be replaced: choose another output")
    folder = out.with_name(out.name + ".work")
    note = folder / "identity.json"
    identity = {"model": _fingerprint(model), "inputs": [sha256_of(path) for path in inputs]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {folder}: {error.strerror}") from None
    if not any(folder.iterdir()):
        write_file(note, json.dumps(identity))
    elif not note.is_file() or json.loads(note.read_text()) != identity:
        raise UserError(f"{folder} is of another model or other texts: remove it, or choose another output")
    try:
        yield folder
    except BaseException:
        if not any(folder.glob("*.done")):
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _fingerprint(model: Path) -> dict[str, str]:
    """Hashes of a model's files. Where CHECKSUMS is, loading compares the files with it, so its own hash will do."""
    names = [CHECKSUMS] if (model / CHECKSUMS).is_file() else sorted(path.name for path in model.glob("*"))
    return {name: sha256_of(model / name) for name in names if (model / name).is_file()}
