"""Rank, world size and the few collectives that the project needs. Without a process group, or with one rank in
it, nothing is sent.

Tensors on a GPU go by NCCL, and host tensors and objects by gloo: so what the host must know makes it wait for other
ranks, but never for the GPU. On a CPU one gloo group serves for both.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")
Group = ProcessGroup | None  # None: all ranks


def active() -> bool:
    """Whether there is a process group."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank(group: Group = None) -> int:
    """The number of this rank in the group; 0 without a process group."""
    return torch_dist.get_rank(group) if active() else 0


def world_size(group: Group = None) -> int:
    """The number of ranks in the group; 1 without a process group."""
    return torch_dist.get_world_size(group) if active() else 1


def local_rank() -> int:
    """The rank on this host, as the launcher set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def device() -> torch.device:
    """The device on which this rank computes and runs its collectives."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device. The host does not wait for the copy."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def host_group(group: Group = None) -> Group:
    """The group by which the ranks of `group` send host tensors: itself, or a gloo group beside it, which the first
    call makes. Collective."""
    if not active():
        return None
    group = group or torch_dist.group.WORLD
    assert group is not None
    return group if torch.device("cpu") in group._device_types else _beside(group)


@functools.cache
def _beside(group: ProcessGroup) -> ProcessGroup:
    ranks = torch_dist.get_process_group_ranks(group)
    timeout = group._get_backend(group._device_types[0]).options._timeout
    made: ProcessGroup = torch_dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
    return made


def _group_for(x: Tensor, group: Group) -> Group:
    return host_group(group) if x.device.type == "cpu" else group


def set_timeout(seconds: int) -> None:
    """From now on, a collective waits this long for other ranks before it fails."""
    if active():
        for group in list(torch_dist.distributed_c10d._world.pg_map):  # DeepSpeed makes groups of its own
            torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class AllRanksError(RuntimeError):
    """An error that all ranks raise at the same place. It is reported once."""


def is_broken(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or does not answer. gloo's own errors have no type."""
    return isinstance(error, torch_dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def barrier() -> None:
    """Wait until all ranks are here. Collective."""
    if active():
        torch_dist.barrier(host_group())


def row_counts(rows: Tensor, group: Group = None) -> list[int]:
    """The number of rows of each rank."""
    return gather_rows(torch.tensor([len(rows)]), group=group).tolist()


def gather_rows(x: Tensor, counts: Sequence[int] | None = None, group: Group = None) -> Tensor:
    """The rows of all ranks, rank 0's first: [b, ...] to [N, ...]. No gradient. `counts`: the number of rows of each
    rank, needed if they differ."""
    return x if world_size(group) == 1 else torch.cat(gather_parts(x, counts, group))


def gather_parts(x: Tensor, counts: Sequence[int] | None = None, group: Group = None) -> list[Tensor]:
    """The rows of each rank, like `gather_rows`."""
    if world_size(group) == 1:
        return [x]
    counts = counts or [len(x)] * world_size(group)
    longest = max(counts)
    if longest == 0:
        return [x] * len(counts)
    if len(x) < longest:
        x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    everyone = x.new_empty(len(counts) * longest, *x.shape[1:])
    torch_dist.all_gather_into_tensor(everyone, x.contiguous(), group=_group_for(x, group))
    return [part[:count] for part, count in zip(everyone.split(longest), counts, strict=True)]


def own_rows(counts: Sequence[int], group: Group = None) -> slice:
    """The place of this rank's rows among the rows of all ranks."""
    first = sum(counts[: rank(group)])
    return slice(first, first + counts[rank(group)])


def gather_lanes(lanes: Sequence[Tensor], uneven: bool = False) -> Tensor:
    """The rows of all lanes, in lane order. `lanes`: the rows of each lane of this rank, lowest lane first. Lane l runs
    on rank l mod W. `uneven`: lanes may have different numbers of rows."""
    return torch.cat([gather_rows(rows, row_counts(rows) if uneven else None) for rows in lanes])


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks, in place, on every rank."""
    if world_size(group) > 1:
        torch_dist.all_reduce(x, group=_group_for(x, group))
    return x


def max_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """The maximum over ranks, in place, on every rank."""
    if world_size(group) > 1:
        torch_dist.all_reduce(x, torch_dist.ReduceOp.MAX, group=_group_for(x, group))
    return x


def agree(mine: bool) -> bool:
    """Whether `mine` is true on every rank."""
    return int(max_over_ranks(torch.tensor(int(not mine)))) == 0


def gather_objects(value: T) -> list[T]:
    """Small Python values of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value, host_group())
    return values


def first_problem(mine: str) -> str:
    """The text of the first rank whose text is not empty; empty if all are. Collective."""
    return next(filter(None, gather_objects(mine)), "")


def from_first_rank(value: object) -> object:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, group=host_group())
    return box[0]
