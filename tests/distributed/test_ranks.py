"""The harness itself: what a rank returns, raises or fails to do reaches the test."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from infoxlm_ds import dist as ours
from infoxlm_ds.config import UserError
from tests.distributed.ranks import run_ranks


def _sum_over_ranks(rank: int, world_size: int, scale: int) -> torch.Tensor:
    dist.init_process_group("gloo")
    weight = torch.full((3,), float(scale * (rank + 1)), requires_grad=True)
    weight.square().sum().backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    return weight.grad


def _host_values(rank: int, world_size: int) -> tuple[object, ...]:
    dist.init_process_group("cuda:gloo", timeout=timedelta(seconds=44))  # takes no host tensors, as NCCL
    with pytest.raises(RuntimeError, match="cpu"):
        dist.all_reduce(torch.ones(1))
    beside = ours.host_group()
    assert beside is not None and beside is not dist.group.WORLD and beside is ours.host_group()
    assert _timeout(beside) == timedelta(seconds=44)
    ours.set_timeout(77)
    assert _timeout(beside) == timedelta(seconds=77)
    pair = dist.new_group([0, 1], backend="cuda:gloo")
    counts = ours.row_counts(torch.zeros(rank + 2, 1), pair) if rank < 2 else None
    ours.barrier()
    total = int(ours.sum_over_ranks(torch.tensor(rank)))
    return total, ours.agree(rank != 1), ours.gather_objects(rank), ours.from_first_rank(rank), counts


def _timeout(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def test_host_values_go_by_a_gloo_group_where_the_default_group_takes_none() -> None:
    whole, *others = run_ranks(_host_values, 3)
    assert whole == (3, False, [0, 1, 2], 0, [2, 3])
    assert others == [whole, (*whole[:4], None)]


def _fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise UserError("no shard for rank 1")
    time.sleep(60)


def _die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _hang(rank: int, world_size: int) -> None:
    time.sleep(60 * rank)


def test_ranks_reduce_over_gloo_after_a_backward_in_the_parent() -> None:
    torch.ones(3, requires_grad=True).sum().backward()
    results = run_ranks(_sum_over_ranks, 2, 5)
    assert [result.tolist() for result in results] == [[30.0] * 3] * 2


def test_a_closure_runs_and_results_come_in_rank_order() -> None:
    offset = 10
    assert run_ranks(lambda rank, world_size: (offset + rank, world_size), 3) == [(10, 3), (11, 3), (12, 3)]


def test_an_exception_of_one_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(UserError, match="no shard") as caught:
        run_ranks(_fail_on_rank_1, 2)
    assert any("on rank 1 of 2" in note and "_fail_on_rank_1" in note for note in caught.value.__notes__)


def test_a_killed_rank_ends_the_call() -> None:
    with pytest.raises(RuntimeError, match="rank 1 ended with exit code -9"):
        run_ranks(_die_on_rank_1, 2)


def test_a_rank_that_hangs_is_named_and_its_stack_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_ranks(_hang, 2, timeout=1)
    assert "in _hang" in capfd.readouterr().err
