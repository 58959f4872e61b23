"""Writes and reads one rank's files of a checkpoint, with their hashes.

Our own tensors are safetensors and the rest is JSON: reading them runs no code. DeepSpeed's files are pickles.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_map_only

from infoxlm_ds.atomic import sync
from infoxlm_ds.checkpoint.store import Receipt

Contents = dict[str, Any]  # by file name: .safetensors of tensors by name, .json of plain values, .pt of anything


class _Hashing:
    """A file that hashes what is written to it. The disk may hold something else: a reader compares later.

    `receipt` raises an error of the disk: torch.save would hide it behind an error of its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        self._bytes += len(data)
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:
            self._error = error
        return len(data)

    def flush(self) -> None: ...

    def receipt(self, name: str) -> Receipt:
        """Name, size and hash of what was written. It is on the disk after the call."""
        if self._error is not None:
            raise self._error
        self._file.flush()
        os.fsync(self._file.fileno())
        return Receipt(name, self._bytes, self._hash.hexdigest())


def write_files(folder: Path, contents: Contents) -> list[Receipt]:
    """Write files. They are on the disk after the call. OSError if they do not fit."""
    receipts = []
    for name, value in contents.items():
        with (folder / name).open("wb") as file:
            hashing = _Hashing(file)
            _write(hashing, name, value)
            receipts.append(hashing.receipt(name))
    sync(folder)
    return receipts


def _write(file: _Hashing, name: str, value: Any) -> None:
    if name.endswith(".safetensors"):
        file.write(save(value))
    elif name.endswith(".json"):
        file.write(json.dumps(value, indent=1).encode())
    else:
        torch.save(value, file)  # type: ignore[arg-type]  # it only writes


def to_host(contents: Contents) -> Contents:
    """A copy in the host's memory, which a thread writes while training goes on. Tensors that share memory, such as
    tied weights, share it in the copy too."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        key = (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype)
        if key not in copies or x.numel() == 0:
            copies[key] = x.detach().to("cpu", copy=True)
        return copies[key]

    tensors = tree_map_only(Tensor, copied, contents)
    return copy.deepcopy(tensors, {id(x): x for x in copies.values()})


def read_slices(parts: Iterable[Path], wanted: dict[str, int]) -> dict[str, Tensor]:
    """Values of the `wanted` fragments, read from files whose fragments are cut at other places. A fragment is named
    `parameter:start`; `wanted` gives its number of values. RuntimeError if the files lack some values."""
    values_of = {name: torch.empty(length) for name, length in wanted.items()}
    missing = dict(wanted)
    by_parameter: dict[str, list[tuple[str, int]]] = {}
    for name in wanted:
        parameter, start = name.split(":")
        by_parameter.setdefault(parameter, []).append((name, int(start)))
    for path in parts:
        with safe_open(path, "pt") as part:
            for saved in part.keys():  # noqa: SIM118  # not a mapping
                parameter, first = saved.split(":")
                values = part.get_slice(saved)
                span = range(int(first), int(first) + values.get_shape()[0])
                for name, begin in by_parameter.get(parameter, []):
                    low, high = max(span.start, begin), min(span.stop, begin + wanted[name])
                    if low < high:
                        values_of[name][low - begin : high - begin] = values[low - span.start : high - span.start]
                        missing[name] -= high - low
        if not any(missing.values()):
            return values_of
    raise RuntimeError(f"no file holds all of the fragments {[name for name, left in missing.items() if left]}")
