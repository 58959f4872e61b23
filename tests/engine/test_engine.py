"""The engine's claims about DeepSpeed hold."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock

import deepspeed.comm
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from infoxlm_ds.config import Optimizer
from infoxlm_ds.engine.engine import MOMENTS, Engine
from infoxlm_ds.engine.ranks import start_ranks
from tests.corpus import ROOT
from tests.distributed.ranks import run_ranks

CONFIGS = ["zero0_fp32", *(f"zero{stage}_{kind}" for stage in (1, 2, 3) for kind in ("fp32", "bf16"))]


def _small_engine(world: int, config: str) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    engine = json.loads((ROOT / "ds_configs" / f"{config}.json").read_text())
    return Engine(module, engine, Optimizer(learning_rate=0.1, steps=9, warmup=1), world)


def _contracts(rank: int, world: int) -> dict[str, tuple[int, set[str], int]]:
    """For each configuration: the number of elements of Adam's moments before the first step; the types in which
    gradients were reduced in four steps; how often a device was synchronised in them."""
    start_ranks()
    seen: dict[str, tuple[int, set[str], int]] = {}
    for config in CONFIGS:
        engine = _small_engine(world, config)
        moments = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in engine.optimizer.state.values())
        with pytest.MonkeyPatch.context() as patch:
            reduced, synchronised = _watch_reductions(patch), Mock()
            patch.setattr(get_accelerator(), "synchronize", synchronised)
            for step in range(4):
                inputs = torch.ones(1, 8, dtype=torch.bfloat16 if "bf16" in config else torch.float32)
                engine.backward(engine.forward(inputs).sum())
                engine.step(step)
        seen[config] = (moments, reduced, synchronised.call_count)
    return seen


def _watch_reductions(patch: pytest.MonkeyPatch) -> set[str]:
    """The types in which ranks add up tensors from now on. Single numbers, such as norms, are left out."""
    types: set[str] = set()
    for name in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_fn"):
        original = getattr(deepspeed.comm, name)

        def watched(*arguments: Any, _original: Any = original, **options: Any) -> Any:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.numel() > 1]
            types.update(str(x.dtype) for x in tensors)
            return _original(*arguments, **options)

        patch.setattr(deepspeed.comm, name, watched)
    return types


def test_moments_are_there_before_the_first_step_gradients_are_summed_in_fp32_and_nothing_is_timed() -> None:
    """Without the moments, a rehearsal of the longest batch would miss 8 bytes for each parameter. The throughput timer
    would synchronise a GPU twice in a micro-step."""
    parameters = 8 * 8 + 8 + 8 + 1
    results = run_ranks(_contracts, 2)
    for config in CONFIGS:
        moments = [moments for moments, _, _ in (of_rank[config] for of_rank in results)]
        copies = 2 if config == "zero0_fp32" else 1  # stage 0: every rank holds all of them
        assert sum(moments) >= 2 * copies * parameters, config
        for of_rank in results:
            assert of_rank[config][1:] == ({"torch.float32"}, 0), config


def _copy_and_clip(rank: int, world: int) -> tuple[Any, list[float]]:
    """What a copy at stage 3 is told about streams; and, at stage 0 on one rank, the norm of the gradients before
    clipping, their norm after it, and how many times DeepSpeed reduced."""
    start_ranks()
    engine = _small_engine(world, "zero3_fp32")
    initialize = Mock(wraps=deepspeed.initialize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", initialize)
        engine.copy(nn.Linear(8, 8))
    told = initialize.call_args.kwargs["config"]["zero_optimization"]["overlap_comm"]
    module = nn.Linear(8, 1, bias=False)
    engine = Engine(module, {}, Optimizer(learning_rate=0.1, steps=9, warmup=1, clip=0.5), world)
    with pytest.MonkeyPatch.context() as patch:
        reduced = _watch_reductions(patch)
        engine.backward(engine.forward(torch.ones(1, 8)).sum())
        clipped = Mock(wraps=nn.utils.clip_grads_with_norm_)
        patch.setattr(nn.utils, "clip_grads_with_norm_", clipped)
        before = module.weight.detach().clone()
        assert module.weight.grad is not None
        gradient = module.weight.grad
        engine.step(0)
    assert not torch.equal(before, module.weight)
    return told, [engine.gradient_norm, float(gradient.norm()), float(len(reduced)), float(clipped.call_count)]


def test_one_rank_at_stage_0_reduces_nothing_and_clips_once_and_copies_gather_on_the_default_stream() -> None:
    """At stage 3, DeepSpeed would gather a copy's weights on a stream of its own, before they are written."""
    ((told, (norm, clipped, reductions, times)),) = run_ranks(_copy_and_clip, 1)
    assert told is False
    assert norm == pytest.approx(8**0.5)
    assert clipped == pytest.approx(0.5, rel=1e-5)
    assert (reductions, times) == (0, 1)


def _tiny(rank: int, world: int, stage: int) -> tuple[list[tuple[str, int, int]], float]:
    """What of a single bias and eight weights this rank holds; and what the module gives when the master weights are
    all 3 and the bias is 1."""
    start_ranks()
    module = nn.Linear(8, 1)
    engine = Engine(module, {"zero_optimization": {"stage": stage}}, Optimizer(learning_rate=0.1, steps=2, warmup=1), 4)
    held = []
    for name, start, values in engine.state():
        assert set(values) == {"master", *MOMENTS} and len({len(x) for x in values.values()}) == 1
        values["master"][:] = 1 if name == "bias" else 3
        held.append((name, start, len(values["master"])))
    engine.resume({"steps": 5, "skipped": 1, "loss_scale": {}}, applied=4)
    assert engine.counters() == {"steps": 5, "skipped": 1, "loss_scale": {}}
    assert all(float(moments["step"]) == 4 for moments in engine.optimizer.state.values())
    return held, float(engine.forward(torch.ones(1, 8)))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_hold_nothing_of_a_group_give_and_take_fragments(stage: int) -> None:
    """At most one of four ranks holds more than padding of the single bias."""
    results = run_ranks(_tiny, 4, stage)
    assert [value for _, value in results] == [25.0] * 4
    whole = [("bias", 0, 1), ("weight", 0, 8)]
    if stage == 0:
        assert all(sorted(held) == whole for held, _ in results)
        return
    for name, _, size in whole:
        covered = [i for held, _ in results for at, start, n in held if at == name for i in range(start, start + n)]
        assert sorted(covered) == list(range(size))
