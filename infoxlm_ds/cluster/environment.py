"""The rank, host and address of this process, whether DeepSpeed's launcher, torchrun, srun or nothing started it."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress

import psutil
import torch

from infoxlm_ds.config import Batch

LOOPBACK = "lo"
LAUNCHER = "INFOXLM_LAUNCHER"  # the number of the process that is `infoxlm train`
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def settle() -> None:
    """Set the variables that torch's `env://` reads, divide the host's cores among its ranks, and choose gloo's network
    interface. Existing variables are kept."""
    variables = ALONE
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        variables = from_slurm(os.environ, torch.cuda.device_count())
    elif "RANK" in os.environ and "LOCAL_SIZE" in os.environ:  # the name that DeepSpeed's launcher uses
        variables = {"LOCAL_WORLD_SIZE": os.environ["LOCAL_SIZE"]}
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if "GLOO_SOCKET_IFNAME" not in os.environ and int(os.environ["WORLD_SIZE"]) > local_ranks:
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface != LOOPBACK:
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def follow_launcher() -> None:
    """Send this process SIGTERM, on which it saves and stops, when the `infoxlm train` that started it on this machine
    is gone: a `kill -9` of that one alone would leave the ranks training. DeepSpeed's launcher stands between them, so
    the kernel's own signal at a parent's death does not help. The thread sleeps until then."""
    if (launcher := os.environ.get(LAUNCHER)) is None:
        return

    def wait() -> None:
        with suppress(ProcessLookupError):
            watched = select.poll()
            watched.register(os.pidfd_open(int(launcher)), select.POLLIN)
            watched.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def ranks_here(batch: Batch) -> int:
    """The number of ranks of a run on this machine alone: the largest that divides the lanes, up to the number of GPUs,
    or up to two without GPUs."""
    most = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    return max(world for world in batch.worlds if world <= most)


def from_slurm(environment: Mapping[str, str], gpus: int) -> dict[str, str]:
    """Torch's variables from those that srun sets. `gpus`: how many GPUs this task sees."""
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    local = int(environment["SLURM_LOCALID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        # If srun binds one GPU to each task, every task sees it as number 0.
        "LOCAL_RANK": str(local % gpus if gpus else local),
        "LOCAL_WORLD_SIZE": str(-(-tasks // int(environment["SLURM_STEP_NUM_NODES"]))),
        "MASTER_ADDR": first_of_nodelist(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 10000),
    }


def first_of_nodelist(nodes: str) -> str:
    """The first host of a Slurm node list: gpu03 of gpu[03-17,21],login1."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def interface_towards(address: str) -> str:
    """The network interface that leads to an address; the loopback if none does. By default gloo listens at the address
    of this host's name, which on many systems is the loopback (127.0.1.1 on Debian)."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:  # connecting UDP sends nothing
            probe.connect(target)
            own = probe.getsockname()[0]
    except OSError:
        return LOOPBACK
    interfaces = psutil.net_if_addrs().items()
    return next(
        (name for name, addresses in interfaces if any(a.address.split("%")[0] == own for a in addresses)), LOOPBACK
    )
