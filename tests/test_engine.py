"""What the engine says of DeepSpeed."""

from __future__ import annotations

from torch import nn

from infoxlm_ds.config import Optimizer
from infoxlm_ds.engine import Engine, start_ranks
from tests.distributed.ranks import run_ranks


def _loads_universal(rank: int, world: int, stage: int) -> bool:
    start_ranks()
    module = nn.Linear(8, 1)  # one bias: at most one rank holds more than padding of it
    optimizer = Optimizer(learning_rate=0.1, steps=2, warmup=1)
    engine = Engine(module, {"zero_optimization": {"stage": stage}}, optimizer, world)
    return engine.loads_universal


def test_ranks_that_hold_no_part_of_a_group_cannot_load_universal_checkpoints() -> None:
    assert run_ranks(_loads_universal, 1, 2) == [True]
    assert run_ranks(_loads_universal, 4, 2) == [True, False, False, False]
    assert all(run_ranks(_loads_universal, 4, 3))
