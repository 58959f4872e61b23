"""One update, however it is split; the key encoder moves; a run goes on bit by bit where it stopped."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import pytest
import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine import start_ranks
from infoxlm_ds.model.queue import KeyQueue
from infoxlm_ds.train import build, check_inputs
from infoxlm_ds.trainer import TrainState, fit, train_step
from tests.corpus import small_recipe
from tests.distributed.masters import whole, whole_masters
from tests.distributed.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "ds_configs"
ENGINE = [f"engine={CONFIGS / name}.json" for name in ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32")]
CONTRASTS = {
    "momentum_both": [],
    "momentum_queue_one_direction": ["contrast.negatives=queue", "contrast.symmetric=false"],
    "momentum_mixup": ["contrast.mixup=paper"],
    "gradient_in_batch": ["contrast.keys=gradient", "contrast.negatives=in_batch"],
    "gradient_both": ["contrast.keys=gradient"],
    "momentum_sharded_queue": ["contrast.queue.sharded=true", "contrast.queue.size=37"],
    "gradient_sharded_queue": ["contrast.keys=gradient", "contrast.queue.sharded=true"],
    "momentum_learned_temperature": ["contrast.learn_temperature_within=[0.05, 0.3]", "contrast.margin=0.1"],
    "gradient_learned_temperature": ["contrast.keys=gradient", "contrast.learn_temperature_within=[0.05, 0.3]"],
    "gradient_several_positives": [
        "contrast.keys=gradient",
        "contrast.same_text=positive",
        "contrast.pairs_per_row=2",
        "contrast.drop_within=0.05",
    ],
    "momentum_mixup_reference": ["contrast.mixup=reference"],
    "reference_reduction": ["reduction=reference"],
    "xlco_alone": ["weights.mmlm=0", "weights.tlm=0"],
    "without_xlco": ["weights.xlco=0"],
}


def _start(recipe: Recipe) -> TrainState:
    start_ranks()
    return build(check_inputs(recipe, dist.rank(), dist.world_size()))


def _whole_state(state: TrainState) -> dict[str, Tensor]:
    names, parameters = zip(*state.objective.model.named_parameters(prefix="model"), strict=True)
    out = dict(zip(names, whole_masters(state.engine, parameters), strict=True))
    if state.momentum is not None:
        names, parameters = zip(*state.momentum.encoder.named_parameters(prefix="key"), strict=True)
        out |= zip(names, whole(state.momentum.shadow, parameters, state.engine.sharded), strict=True)
    if state.queue is not None:
        out |= {f"queue.{name}": value for name, value in _whole_queue(state.queue).items()}
    if state.objective.temperature is not None:
        out["temperature"] = state.objective.temperature().detach().clone()
    return out


def _whole_queue(queue: KeyQueue) -> dict[str, Tensor]:
    """All rows in order, of a sharded queue from all ranks."""
    parts = dist.gather_objects(queue.state_dict()) if queue.sharded else [queue.state_dict()]
    rows: dict[str, Tensor] = {}
    for part in parts:
        assert isinstance(part, dict)
        order = part.pop("numbers")
        assert int(part["pushed"]) >= queue.size
        rows |= {name: torch.cat([rows.get(name, value[:0]), value]) for name, value in part.items() if value.ndim}
        rows["numbers"] = torch.cat([rows.get("numbers", order[:0]), order])
    order = rows["numbers"].argsort()
    return {name: value[order].clone() for name, value in rows.items()}


def _three_steps(rank: int, world: int, recipe: Recipe) -> dict[str, Tensor]:
    state = _start(recipe)
    losses = []
    for _ in range(3):
        assert train_step(state)
        losses.append(state.meter.collect().sums["loss"])
    return _whole_state(state) | {"losses": torch.tensor(losses)}


@pytest.mark.parametrize("overrides", CONTRASTS.values(), ids=CONTRASTS.keys())
def test_update_is_the_same_for_every_world_size(corpus: Path, tmp_path: Path, overrides: list[str]) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", *overrides)
    (alone,) = run_ranks(_three_steps, 1, recipe)
    assert float(alone["losses"][2]) != float(alone["losses"][0])
    for world in (2, 4):
        for rank, result in enumerate(run_ranks(_three_steps, world, recipe)):
            for name, value in result.items():
                _close(value, alone[name], f"world {world}, rank {rank}, {name}")


@pytest.mark.parametrize("contrast", ["momentum_both", "gradient_both", "gradient_in_batch"])
def test_update_is_the_same_for_every_stage_and_world_size(corpus: Path, tmp_path: Path, contrast: str) -> None:
    """Four lanes: one, two or four micro-steps a rank."""
    (alone,) = run_ranks(_three_steps, 1, small_recipe(corpus, tmp_path / "run", *CONTRASTS[contrast], ENGINE[0]))
    for stage in (0, 1, 2, 3):
        recipe = small_recipe(corpus, tmp_path / "run", *CONTRASTS[contrast], ENGINE[stage])
        for world in (1, 2, 4):
            for result in run_ranks(_three_steps, world, recipe):
                for name, value in result.items():
                    _close(value, alone[name], f"ZeRO {stage}, world {world}, {name}")


def _close(value: Tensor, expected: Tensor, name: str) -> None:
    """1e-5 relative of the tensor's largest value."""
    if not value.is_floating_point():
        assert torch.equal(value, expected), name
        return
    if name.endswith("attention.self.key.bias"):  # its gradient is mathematically zero: Adam steps on noise
        return
    largest = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(value, expected, atol=1e-5 * largest, rtol=1e-5, msg=name)


def _diverge(rank: int, world: int, recipe: Recipe) -> str:
    state = _start(recipe)
    with pytest.raises(RuntimeError) as caught:
        fit(state, None)
    return str(caught.value)


def test_steps_that_are_never_applied_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", "optimizer.learning_rate=1e30", "optimizer.clip=0")
    for message in run_ranks(_diverge, 2, recipe):
        assert "after step" in message and "not finite" in message


def _follow(rank: int, world: int, recipe: Recipe) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """fp32 masters of the query side and key weights after each step."""
    state = _start(recipe)
    assert state.momentum is not None
    queries, keys = [], []
    for step in range(4):
        if step:
            train_step(state)
        encoder = state.objective.model.sentence_encoder()
        names = [name for name, _ in encoder.named_parameters()]
        queries.append(dict(zip(names, whole_masters(state.engine, list(encoder.parameters())), strict=True)))
        with deepspeed.zero.GatheredParameters(list(state.momentum.encoder.parameters())):
            keys.append({name: p.float().clone() for name, p in state.momentum.encoder.named_parameters()})
    return queries, keys


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [("zero1_fp32", 1e-6), ("zero3_fp32", 1e-6), ("zero1_bf16", 2**-8), ("zero2_bf16", 2**-8), ("zero3_bf16", 2**-8)],
)
def test_key_encoder_is_the_fp32_average_of_the_masters(
    corpus: Path, tmp_path: Path, config: str, tolerance: float
) -> None:
    """In bf16 the compute copy is the fp32 average rounded once, however small the moves were."""
    engine = Path(__file__).parents[2] / "ds_configs" / f"{config}.json"
    recipe = small_recipe(corpus, tmp_path / "run", f"engine={engine}", "contrast.momentum=0.99")
    for queries, keys in run_ranks(_follow, 2, recipe):
        average = queries[0]
        for query, key in zip(queries[1:], keys[1:], strict=True):
            average = {name: 0.99 * average[name] + 0.01 * value for name, value in query.items()}
            for name, value in average.items():
                torch.testing.assert_close(key[name], value, atol=1e-7, rtol=tolerance, msg=name)
        assert any(not torch.equal(queries[0][name], queries[-1][name]) for name in queries[0])


def _train(rank: int, world: int, recipe: Recipe, stop_after: int | None) -> tuple[dict[str, Tensor], int]:
    state = _start(recipe)
    if stop_after is not None:
        _raise_signal_after(state, stop_after)
    done = fit(state, None)
    assert done == (stop_after is None)
    return _whole_state(state), state.step


def _raise_signal_after(state: TrainState, step: int) -> None:
    """On one rank only: the others must learn of it."""
    import os
    import signal

    forward = state.engine.step

    def stepping(done: int) -> bool:
        if done + 1 == step and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(done)

    state.engine.step = stepping  # type: ignore[method-assign]


@pytest.mark.parametrize("config", ["zero0_fp32", "zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_fp32", "zero3_bf16"])
@pytest.mark.parametrize("contrast", ["momentum_both", "gradient_both", "momentum_sharded_queue"])
def test_a_stopped_run_goes_on_bit_equal(corpus: Path, tmp_path: Path, config: str, contrast: str) -> None:
    engine = Path(__file__).parents[2] / "ds_configs" / f"{config}.json"
    overrides = [f"engine={engine}", *CONTRASTS[contrast]]
    whole = run_ranks(_train, 2, small_recipe(corpus, tmp_path / "whole", *overrides), None)
    recipe = small_recipe(corpus, tmp_path / "stopped", *overrides)
    stopped = run_ranks(_train, 2, recipe, 3)
    assert all(step == 3 for _, step in stopped)
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == "step-00000003"
    resumed = run_ranks(_train, 2, recipe, None)
    for (expected, _), (value, step) in zip(whole, resumed, strict=True):
        assert step == 6
        for name in expected:
            assert torch.equal(value[name], expected[name]), name
