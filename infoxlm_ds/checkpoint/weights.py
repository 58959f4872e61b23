"""Reads a checkpoint's weights as whole tensors, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from infoxlm_ds.checkpoint.fragments import Index, Piece, read_pieces
from infoxlm_ds.checkpoint.store import Store, damage_of, read_state
from infoxlm_ds.config import UserError


class Weights:
    """The fp32 weights of an undamaged checkpoint, read one parameter at a time: the masters, or the key encoder's
    averages."""

    def __init__(self, checkpoint: Path, kind: str = "master") -> None:
        self._folder, self._kind, self._index = checkpoint, kind, Index.read(checkpoint)
        names = {name: name for name in self._index.parameters} | self._index.tied
        self._names = {
            name: stored for name, stored in names.items() if kind in self._index.parameters[stored].kinds
        }  # under which a weight is used, and under which it is stored

    @property
    def like(self) -> dict[str, Tensor]:
        """Tensors of the same names and shapes, without memory."""
        shapes = {name: self._index.parameters[stored].shape for name, stored in self._names.items()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._names[name]
        values = torch.empty(self._index.parameters[stored].shape)
        read_pieces(self._folder, self._index, [Piece(stored, 0, {self._kind: values.view(-1)})])
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


def undamaged(run: Path, step: int | None = None) -> Path:
    """The checkpoint of a step, or the newest. UserError if it is missing, damaged or of another format."""
    path = Store(run).at(step)
    if path.is_dir():
        read_state(path)
    if damage := damage_of(path):
        raise UserError(f"{path}: {damage}: restore it from a copy, or go on training with resume.fallback=true")
    return path
