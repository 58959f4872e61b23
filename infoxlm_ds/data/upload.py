"""Uploads a batch in one copy: all its tensors lie in one buffer, which is page-locked if a GPU will read it.

A batch is any nest of dataclasses and tuples. Its tensors are moved, and everything else stays as it is. Fields of
dataclasses that have ON_HOST as metadata stay too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")
ON_HOST = {"on_host": True}
ALIGNMENT = 16  # bytes; a tensor of any type may begin at a multiple of it


def in_one_buffer(batch: B, pinned: bool) -> B:
    """The same batch with its tensors copied into one buffer. They must be on the host."""
    sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in _tensors(batch)]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
    parts = iter(buffer.split(sizes))

    def copied(x: Tensor) -> Tensor:
        part = next(parts)[: x.nbytes].view(x.dtype).view(x.shape)
        return part.copy_(x)

    moved: B = _mapped(batch, copied)
    return moved


def to_device(batch: B, device: torch.device) -> B:
    """The same batch on a device, by one copy that does not block the host. A batch for a CPU is returned as it is."""
    if device.type == "cpu":
        return batch
    tensors = _tensors(batch)
    if not tensors:
        return batch
    one_buffer = len({x.untyped_storage().data_ptr() for x in tensors}) == 1
    if not one_buffer or not all(x.is_contiguous() for x in tensors):
        batch = in_one_buffer(batch, pinned=device.type != "meta")
    storage = _tensors(batch)[0].untyped_storage()
    buffer = torch.empty(0, dtype=torch.uint8).set_(storage).to(device, non_blocking=True)

    def viewed(x: Tensor) -> Tensor:
        start = x.storage_offset() * x.element_size()
        return buffer[start : start + x.nbytes].view(x.dtype).view(x.shape)

    moved: B = _mapped(batch, viewed)
    return moved


def _tensors(batch: object) -> list[Tensor]:
    tensors: list[Tensor] = []
    _mapped(batch, lambda x: tensors.append(x) or x)  # type: ignore[func-returns-value]
    return tensors


def _mapped(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `move` applied to each tensor in it, always in the same order."""
    if isinstance(value, Tensor):
        return move(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = (field for field in dataclasses.fields(value) if not field.metadata.get("on_host"))
        return dataclasses.replace(value, **{field.name: _mapped(getattr(value, field.name), move) for field in moved})
    if isinstance(value, tuple):
        items = [_mapped(item, move) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
