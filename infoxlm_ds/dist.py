"""Rank, world and the few collectives the project needs, with one-process fall-backs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor


def active() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if active() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if active() else 1


def local_rank() -> int:
    """The rank on this host, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", 0))


def device() -> torch.device:
    """Where this rank computes, and what its collectives run on."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    if active():
        torch_dist.barrier()


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, rank 0's first: [b, ...] to [W b, ...]. Every rank has the same number of rows. No
    gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    torch_dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_lanes(lanes: Sequence[Tensor]) -> Tensor:
    """Each rank's rows of its lanes, lowest lane first, as the rows of all lanes in lane order: lane l runs on rank l
    mod W."""
    return torch.cat([gather_rows(rows) for rows in lanes])


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, in place; every rank gets it."""
    if world_size() > 1:
        torch_dist.all_reduce(x)
    return x


def gather_objects(value: object) -> list[object]:
    """Small Python values of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[object] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def from_first_rank(value: object) -> object:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]
