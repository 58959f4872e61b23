"""Measures the network between two hosts, with an all-reduce as in training."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as torch_dist

from infoxlm_ds.cluster.environment import interface_towards

LARGE = 16 * 2**20  # bytes
PATIENCE = 20  # seconds


def exchange(rank: int, address: str, port: int) -> dict[str, float]:
    """All-reduce with one partner; rank 0 is at `address`. Returns `latency`, the seconds of a small all-reduce, and
    `bandwidth`, the bytes a second of a large one (each of the two ranks sends the reduced bytes once). RuntimeError if
    they cannot connect."""
    gpu = torch.cuda.is_available()
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = given or interface_towards(address)
    patience = timedelta(seconds=PATIENCE)
    where = f"tcp://{address}:{port}"
    torch_dist.init_process_group("nccl" if gpu else "gloo", where, patience, 2, rank)
    try:
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        latency, large = (
            _seconds(torch.zeros(1, device=device), 20),
            _seconds(torch.zeros(LARGE // 4, device=device), 5),
        )
    finally:
        torch_dist.destroy_process_group()
        if given is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
    return {"latency": latency, "bandwidth": LARGE / large}


def _seconds(tensor: torch.Tensor, times: int) -> float:
    """Median seconds of an all-reduce, after one to warm up."""
    seconds = []
    for _ in range(times + 1):
        started = time.monotonic()
        torch_dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return median(seconds[1:])
