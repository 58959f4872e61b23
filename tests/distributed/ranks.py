"""Runs a function on several ranks, forked from the test process, so that torch and DeepSpeed are imported once.

A fork keeps the parent's memory but not its threads: `tests/conftest.py` holds torch to one thread for that reason.
After a backward pass in a process that sees a GPU, torch refuses another in its forks: `make test` hides GPUs from it.
"""

import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import deepspeed
import torch

# What DeepSpeed and transformers import only when they build something.
LATE = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.profiler._cupti_monitor",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank at once and return the results in rank order.

    Each rank finds what a launcher would set (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT) and
    opens its own gloo process group. The first exception of a rank is raised here with the rank's traceback as a note;
    a rank that dies raises RuntimeError, one that takes longer than `timeout` seconds TimeoutError (its stack goes to
    stderr). No rank outlives the call.
    """
    _prepare()
    port = _free_port()
    context = multiprocessing.get_context("fork")
    ranks: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_rank_main, args=(theirs, function, rank, world_size, port, args)
            )
            process.start()
            theirs.close()
            ranks[ours] = rank
            processes.append(process)
        return _collect(ranks, processes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for connection in ranks:
            connection.close()


@functools.cache
def _prepare() -> None:
    """Do once what every rank would do anew: later imports, and DeepSpeed's search for compilers and libraries."""
    for name in LATE:
        importlib.import_module(name)
    assert deepspeed.ops.__compatible_ops__


def _collect(ranks: dict[Connection, int], processes: list[BaseProcess], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(ranks):
        silent = [connection for connection, rank in ranks.items() if rank not in results]
        ready = wait(silent, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [ranks[connection] for connection in silent]
            _print_stacks([processes[rank] for rank in late])
            raise TimeoutError(f"ranks {late} of {len(ranks)} did not return within {timeout} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = ranks[connection]
            results[rank] = _answer(connection, rank, processes[rank])
    return [results[rank] for rank in range(len(ranks))]


def _answer(connection: Connection, rank: int, process: BaseProcess) -> Any:
    try:
        succeeded, value = pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode} before it returned") from None
    if not succeeded:
        raise value
    return value


def _save_coverage() -> None:
    """What this rank has run, for `make coverage`: a process that is killed writes nothing."""
    coverage = sys.modules.get("coverage")
    if coverage and (running := coverage.Coverage.current()):
        running.stop()
        running.save()


def _rank_main(
    connection: Connection, function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...]
) -> None:
    gc.freeze()  # a collection would write to each object that the parent made, and so copy its memory
    faulthandler.register(signal.SIGUSR1, file=2)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    outcome = _outcome(function, rank, world_size, args)
    _save_coverage()
    connection.send_bytes(outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    # Rank 0 may host the store the others still talk to: wait to be killed, or for the parent to be gone.
    connection.poll(None)
    os._exit(0)


def _outcome(function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...]) -> bytes:
    """The pickled (succeeded, result or exception).

    Plain pickle, since multiprocessing's own would share the memory of tensors that die with the rank.
    """
    try:
        return pickle.dumps((True, function(rank, world_size, *args)))
    except BaseException as error:
        note = f"on rank {rank} of {world_size}:\n{traceback.format_exc()}"
        error.add_note(note)
        try:
            message = pickle.dumps((False, error))
            pickle.loads(message)  # some exceptions pickle but cannot be built again
            return message
        except Exception:
            return pickle.dumps((False, RuntimeError(note)))


def _print_stacks(processes: list[BaseProcess]) -> None:
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)  # the handlers write from the ranks, which are killed next


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
