"""Brings the ranks of a run together, and sets up the process of each."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import deepspeed
import torch

from infoxlm_ds import dist, freed_memory
from infoxlm_ds.cluster import environment
from infoxlm_ds.config import Timeout

PATIENT = Timeout()


class NotJoined(RuntimeError):
    """The ranks did not come together."""


def start_ranks(timeout: Timeout = PATIENT, deterministic: bool = False) -> None:
    """Join the ranks of the launcher, or be the only rank. NotJoined if the others do not come in time.
    `deterministic`: kernels on GPUs give the same bits every time."""
    environment.settle()
    if torch.cuda.is_available():
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(dist.local_rank())
    else:
        # Only inference uses this op; its build takes minutes, and a killed build hangs every later one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        freed_memory.keep()
    joining = timedelta(seconds=timeout.join)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=joining)
        dist.host_group()  # made now, so that the next timeouts hold for it too
    except RuntimeError as error:
        if not dist.is_broken(error):
            raise
        raise NotJoined(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not meet the other ranks within {timeout.join} "
            f"seconds (timeout.join), at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: a host is slow to "
            "start, its start failed, or the network between hosts is closed; `infoxlm doctor --hostfile` checks. "
            f"{str(error).splitlines()[0]}"
        ) from None
    dist.set_timeout(timeout.start)
