"""Writes one rank's files of a checkpoint, with their hashes: safetensors and JSON, which run no code when they are
read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from infoxlm_ds.atomic import sync
from infoxlm_ds.checkpoint.store import INDEX, Receipt

Contents = dict[str, dict[str, Any]]  # by file name: .safetensors of tensors by name, .json of plain values
DTYPES = {torch.float32: "F32", torch.int64: "I64"}


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: Any, /) -> object: ...


class _Hashing:
    """A file that hashes what is written to it. The disk may hold something else: a reader compares later."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes
        self._file.write(data)

    def receipt(self, name: str) -> Receipt:
        """Name, size and hash of what was written. It is on the disk after the call."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return Receipt(name, self._bytes, self._hash.hexdigest())


def write_files(folder: Path, contents: Contents) -> list[Receipt]:
    """Write files. They are on the disk after the call. OSError if they do not fit."""
    receipts = []
    for name, value in contents.items():
        with (folder / name).open("wb") as file:
            hashing = _Hashing(file)
            if name.endswith(".json"):
                hashing.write(json.dumps(value, indent=None if name == INDEX else 1).encode())
            else:
                write_tensors(hashing, value, value.values())
            receipts.append(hashing.receipt(name))
    sync(folder)
    return receipts


def write_tensors(file: Sink, like: Mapping[str, Tensor], values: Iterable[Tensor]) -> None:
    """Write tensors in the format of safetensors: the length of a JSON header, the header, the values one after the
    other. safetensors' own writer first copies the whole file into memory, twice. `like`: tensors of the same names,
    shapes and types as `values`, which may be read while they are written."""
    header, end = {}, 0
    for name, x in like.items():
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for x in values:
        file.write(x.detach().cpu().contiguous().view(-1).numpy().data)


def to_host(contents: Contents) -> Contents:
    """A copy in the host's memory, which a thread writes while training goes on."""
    return {
        file: {key: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x for key, x in values.items()}
        for file, values in contents.items()
    }
