"""Runs implementations in processes of their own, which are forked from this one and work only when they are asked.

So implementations can alternate, each has a peak of memory of its own, and CPU seconds are those of its process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from infoxlm_ds.cluster.hosts import free_port_here

Make = Callable[[int, int], Any]  # takes rank and world size, returns an object whose methods are then called


class Answer(NamedTuple):
    """What a method returned, the CPU seconds of its process, and the peak of the process' resident memory in MiB,
    above that at its start."""

    value: Any
    seconds: float
    peak: float


class Ranks:
    """An implementation on so many ranks, each in its own process."""

    def __init__(self, make: Make, world: int = 1) -> None:
        context, port = multiprocessing.get_context("fork"), free_port_here()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        sys.stdout.flush()
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, rank, world, port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()

    def __call__(self, method: str) -> list[Answer]:
        """Call a method of the object on all ranks at once."""
        for pipe in self._pipes:
            pipe.send(method)
        return self._answers()

    def _answers(self) -> list[Answer]:
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, str):
                raise SystemExit(answer)
        return answers

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.kill()
            process.join()


class Group(ExitStack):
    """Ranks that end together."""

    def start(self, make: Make, world: int = 1) -> Ranks:
        ranks = Ranks(make, world)
        self.callback(ranks.close)
        return ranks

    def __enter__(self) -> Self:
        super().__enter__()
        return self


def cpu(answers: Sequence[Answer]) -> float:
    """CPU seconds of all ranks."""
    return sum(answer.seconds for answer in answers)


def _serve(pipe: Connection, make: Make, rank: int, world: int, port: int) -> None:
    gc.freeze()  # a collection would write to each object of the parent, and so copy its memory
    torch.set_num_threads(1)
    settings: dict[str, int | str] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_SIZE": world,
        "MASTER_PORT": port,
    }
    settings |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    os.environ.update({name: str(value) for name, value in settings.items()})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed reports what it does
    before, parent = _resident("VmRSS"), os.getppid()
    try:
        made = make(rank, world)
        pipe.send(Answer(None, 0.0, 0.0))
        while _asked(pipe, parent):
            method = getattr(made, pipe.recv())
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes the present size
            start = time.process_time()
            value = method()
            seconds = time.process_time() - start
            pipe.send(Answer(value, seconds, (_resident("VmHWM") - before) / 1024))
    except EOFError:
        pass
    except BaseException:
        pipe.send(traceback.format_exc())
    os._exit(0)


def _asked(pipe: Connection, parent: int) -> bool:
    """Wait for the next request. False if the parent is gone: siblings hold its end of the pipe open."""
    while not pipe.poll(5):
        if os.getppid() != parent:
            return False
    return True


def _resident(field: str) -> int:
    """The process' resident set in KiB: now (VmRSS) or its peak (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
