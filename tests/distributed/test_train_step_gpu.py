"""On one GPU, under every ZeRO stage in 16 bits: training steps, a checkpoint, a run that goes on, a rehearsal."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import rehearse, save, train_step
from tests.corpus import ROOT, small_recipe
from tests.distributed.masters import distance, whole_state

pytestmark = pytest.mark.gpu

STAGES, PRECISIONS = (1, 2, 3), ("bf16", "fp16")
# How far apart two runs may be, as a share of how far training moved the weights: a GPU adds up in any order.
BOUND = 0.02


@pytest.fixture(autouse=True)
def alone(device: torch.device, fp16_on_cpu: None) -> None:
    """This process is the only rank."""
    start_ranks()
    assert torch.cuda.is_available() == (device.type == "cuda")


def _start(recipe: Recipe) -> TrainState:
    return build(agreed_inputs(recipe))


def _advance(state: TrainState, steps: int) -> None:
    """So many applied steps. fp16 begins with some that are not."""
    goal = state.step + steps
    for _ in range(40):
        if state.step < goal:
            train_step(state)
    assert state.step == goal


def _snapshot(state: TrainState) -> dict[str, Tensor]:
    return {name: value.cpu().clone() for name, value in whole_state(state, queue=state.step > 2).items()}


def _floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point() and "queue" not in name}


@pytest.mark.parametrize(("stage", "precision"), itertools.product(STAGES, PRECISIONS))
def test_a_run_goes_on_from_its_checkpoint(corpus: Path, tmp_path: Path, stage: int, precision: str) -> None:
    """The key encoder follows at the second step, which also reports what it changed."""
    engine = f"engine={ROOT}/ds_configs/zero{stage}_{precision}.json"
    recipe = small_recipe(corpus, tmp_path / "run", engine, "log.every=2")
    whole = _start(recipe)
    start = _snapshot(whole)
    _advance(whole, 2)
    assert whole.momentum is not None and 0 < whole.observed["momentum/changed_share"] <= 1
    save(whole, None)
    assert not whole.unsaved
    saved = _floats(whole_state(whole))
    resumed = _start(recipe)
    assert resumed.step == 2
    for name, value in _floats(whole_state(resumed)).items():
        assert torch.equal(value, saved[name]), name
    for state in (whole, resumed):
        _advance(state, 2)
        state.loader.close()
    end, again = _snapshot(whole), _snapshot(resumed)
    moved = distance(_floats(end), _floats(start))
    assert moved > 0
    apart = distance(_floats(again), _floats(end))
    assert apart < BOUND * moved, f"{apart / moved:.1e}"
    for name in ("queue.ids", "queue.steps", "queue.numbers"):
        assert torch.equal(again[name], end[name])
    assert all(torch.isfinite(value).all() for value in _floats(end).values())


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "fp16")])
def test_a_rehearsal_leaves_nothing_behind(corpus: Path, tmp_path: Path, stage: int, precision: str) -> None:
    engine = f"engine={ROOT}/ds_configs/zero{stage}_{precision}.json"
    state = _start(small_recipe(corpus, tmp_path / "run", engine, "memory.activation_checkpointing=true"))
    before = _snapshot(state)
    assert rehearse(state) > 0
    after = _snapshot(state)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    _advance(state, 1)
    state.loader.close()
