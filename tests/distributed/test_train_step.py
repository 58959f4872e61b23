"""One update, however it is split; the key encoder moves; a run goes on bit by bit where it stopped."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.build import agreed_inputs, build, check_inputs
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import fit, rehearse, train_step
from tests.corpus import small_recipe
from tests.distributed.masters import assert_close, distance, whole_state
from tests.distributed.products import cases, product
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
    return build(agreed_inputs(recipe))


def _three_steps(rank: int, world: int, recipe: Recipe) -> dict[str, Tensor]:
    state = _start(recipe)
    losses = []
    for _ in range(3):
        assert train_step(state)
        losses.append(state.meter.collect().sums["loss"])
    return whole_state(state) | {"losses": torch.tensor(losses)}


@pytest.mark.parametrize("overrides", CONTRASTS.values(), ids=CONTRASTS.keys())
def test_update_is_the_same_for_every_world_size(corpus: Path, tmp_path: Path, overrides: list[str]) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", *overrides)
    (alone,) = run_ranks(_three_steps, 1, recipe)
    assert float(alone["losses"][2]) != float(alone["losses"][0])
    for world in (2, 4):
        for rank, result in enumerate(run_ranks(_three_steps, world, recipe)):
            for name, value in result.items():
                assert_close(value, alone[name], f"world {world}, rank {rank}, {name}")


@pytest.mark.parametrize("overrides", [[], ["contrast.keys=gradient"]], ids=["momentum", "gradient"])
def test_update_with_hard_negatives_is_the_same_for_every_world_size(
    corpus_with_negatives: Path, tmp_path: Path, overrides: list[str]
) -> None:
    """Lanes have different numbers of them."""
    run, hard = tmp_path / "run", "contrast.hard_negatives=2"
    (without,) = run_ranks(_three_steps, 1, small_recipe(corpus_with_negatives, run, *overrides))
    (alone,) = run_ranks(_three_steps, 1, small_recipe(corpus_with_negatives, run, hard, *overrides))
    assert float(alone["losses"][0]) > float(without["losses"][0])
    for world in (2, 4):
        for rank, result in enumerate(
            run_ranks(_three_steps, world, small_recipe(corpus_with_negatives, run, hard, *overrides))
        ):
            for name, value in result.items():
                assert_close(value, alone[name], f"world {world}, rank {rank}, {name}")


Reference = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def unsharded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Three steps of a contrast at ZeRO 0 on one rank."""

    @functools.cache
    def train(contrast: str) -> dict[str, Tensor]:
        recipe = small_recipe(corpus, tmp_path_factory.mktemp("unsharded") / "run", *CONTRASTS[contrast], ENGINE[0])
        return run_ranks(_three_steps, 1, recipe)[0]

    return train


STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 4)
SPLIT = ("momentum_both", "gradient_both", "gradient_in_batch")
PAIRED = [(SPLIT[(stage + i) % 3], stage, world) for stage in STAGES for i, world in enumerate(WORLDS)]


@pytest.mark.slow
@pytest.mark.parametrize(("contrast", "stage", "world"), product(SPLIT, STAGES, WORLDS, suite=PAIRED))
def test_update_is_the_same_for_every_stage_and_world_size(
    corpus: Path, tmp_path: Path, unsharded: Reference, contrast: str, stage: int, world: int
) -> None:
    """Four lanes: one, two or four micro-steps a rank."""
    recipe = small_recipe(corpus, tmp_path / "run", *CONTRASTS[contrast], ENGINE[stage])
    for result in run_ranks(_three_steps, world, recipe):
        for name, value in result.items():
            assert_close(value, unsharded(contrast)[name], name)


def test_lanes_without_a_masked_token_count_for_nothing(corpus: Path, tmp_path: Path) -> None:
    """Few masked tokens: some lanes have none of TLM's, some steps none of MMLM's on a whole rank."""
    sizes = ("batch.tlm_tokens=20", "batch.mmlm_tokens=20", "masking.probability=0.06")
    recipe = small_recipe(corpus, tmp_path / "run", *sizes)
    loader = check_inputs(recipe, 0, 1).loader
    counts = [[micro.counts["tlm"] for micro in next(loader)] for _ in range(3)]
    loader.close()
    assert any(0 in step for step in counts) and any(map(sum, counts))
    (alone,) = run_ranks(_three_steps, 1, recipe)
    for engine in ENGINE[1:]:
        for result in run_ranks(_three_steps, 4, small_recipe(corpus, tmp_path / "run", *sizes, engine)):
            for name, value in result.items():
                assert_close(value, alone[name], f"{engine}, {name}")


# How far apart splits may be after three steps, as a share of how far training moved the weights: 16 bits round sums
# that are taken in another order. Measured: .0036 and .0015. The precision itself is .066 and .006 away from fp32.
BOUNDS = {"bf16": 0.006, "fp16": 0.003}


ROUNDED = [
    ("zero1_bf16", 2),
    *itertools.product(["zero2_bf16", "zero3_bf16", "zero2_bf16_offload", "zero3_bf16_offload"], WORLDS),
    ("zero1_fp16", 2),
    *itertools.product(["zero2_fp16", "zero3_fp16"], WORLDS),
]
ROUNDED_IN_SUITE = [
    ("zero1_bf16", 2),
    ("zero2_bf16", 4),
    ("zero3_bf16", 1),
    ("zero2_bf16_offload", 1),
    ("zero3_bf16_offload", 2),
    ("zero1_fp16", 2),
    ("zero2_fp16", 1),
    ("zero3_fp16", 4),
]
States = Callable[[str, int], dict[str, Tensor]]


@pytest.fixture(scope="module")
def unsplit(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> States:
    """The state of one rank at ZeRO 1 in a precision, after so many steps."""

    @functools.cache
    def train(precision: str, steps: int) -> dict[str, Tensor]:
        engine = f"engine={CONFIGS}/zero1_{precision}.json"
        recipe = small_recipe(corpus, tmp_path_factory.mktemp("unsplit") / "run", engine)
        return run_ranks(_steps, 1, recipe, steps)[0]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(("config", "world"), cases(ROUNDED, ROUNDED_IN_SUITE))
def test_splits_in_16_bits_stay_within_their_rounding(
    corpus: Path, tmp_path: Path, fp16_on_cpu: None, unsplit: States, config: str, world: int
) -> None:
    precision = config.split("_")[1]
    start, end = unsplit(precision, 0), unsplit(precision, 3)
    moved = distance(end, start)
    assert moved > 0
    for state in run_ranks(_steps, world, small_recipe(corpus, tmp_path / "run", f"engine={CONFIGS / config}.json"), 3):
        apart = distance(state, end)
        assert apart < BOUNDS[precision] * moved, f"{apart / moved:.1e}"


def _steps(rank: int, world: int, recipe: Recipe, applied: int) -> dict[str, Tensor]:
    """Masters and key weights after so many applied steps; fp16 begins with some that are not."""
    state = _start(recipe)
    if recipe.memory.dry_run:
        assert rehearse(state) > 0
    while state.step < applied:
        train_step(state)
    return {name: value for name, value in whole_state(state, queue=False).items() if value.is_floating_point()}


RECOMPUTED = [
    ("zero0_fp32", "gradient"),
    ("zero1_bf16", "momentum"),
    ("zero2_fp16", "momentum"),
    ("zero3_bf16", "gradient"),
    ("zero3_bf16_offload", "momentum"),
    ("zero1_fp32", "momentum"),
    ("zero1_fp16", "gradient"),
    ("zero3_bf16", "momentum"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "keys"), cases(RECOMPUTED, RECOMPUTED[:5]))
def test_recomputing_activations_and_a_dry_run_change_no_bit(
    corpus: Path, tmp_path: Path, fp16_on_cpu: None, config: str, keys: str
) -> None:
    overrides = [f"engine={CONFIGS / config}.json", f"contrast.keys={keys}"]
    memory = "memory={activation_checkpointing: true, dry_run: true}"
    plain = run_ranks(_steps, 2, small_recipe(corpus, tmp_path / "run", *overrides), 2)
    changed = run_ranks(_steps, 2, small_recipe(corpus, tmp_path / "run", *overrides, memory), 2)
    for expected, found in zip(plain, changed, strict=True):
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def _saved_bytes(rank: int, world: int, recipe: Recipe) -> int:
    """What autograd keeps of a lane for the backward pass, beside the parameters."""
    state = _start(recipe)
    found: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in state.objective.parameters()}

    def keep(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    micros = next(state.loader)
    context = state.objective.prepare(micros, state.momentum, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = state.engine.forward(micros[0], context, 0)
    assert all(loss.requires_grad for loss in held[0].values())
    return sum(size for at, size in found.items() if at not in own)


def test_activation_checkpointing_keeps_little_more_than_the_inputs_of_layers(corpus: Path, tmp_path: Path) -> None:
    shape = (
        "model.layers=6",
        "model.universal_layer=4",
        "weights.mmlm=0",
        "weights.xlco=1",
        "contrast.negatives=queue",
    )
    sizes = [
        run_ranks(_saved_bytes, 1, small_recipe(corpus, tmp_path / "run", *shape, *more))[0]
        for more in ([], ["memory.activation_checkpointing=true"])
    ]
    assert sizes[1] < 0.3 * sizes[0], sizes


def test_the_longest_batch_is_as_long_as_any(corpus: Path, tmp_path: Path) -> None:
    """No lane of the first steps has more tokens, pairs or, but for rare chance, masked pieces."""
    for overrides in ([], ["contrast.mixup=paper"], ["contrast.keys=gradient"], ["weights.tlm=0"]):
        inputs = check_inputs(small_recipe(corpus, tmp_path / "run", *overrides), 0, 1)
        longest = inputs.loader.longest_batch()
        for micro in (micro for _ in range(20) for micro in next(inputs.loader)):
            assert len(micro.tokens.ids) <= len(longest.tokens.ids)
            assert len(micro.rows) <= len(longest.rows) and micro.text_ids.shape == longest.text_ids.shape
            assert (micro.keys is None) == (longest.keys is None)
            assert micro.keys is None or longest.keys is None or len(micro.keys.ids) <= len(longest.keys.ids)
        inputs.loader.close()


def _train(rank: int, world: int, recipe: Recipe, stop_after: int | None) -> tuple[dict[str, Tensor], int]:
    state = _start(recipe)
    if stop_after is not None:
        _raise_signal_after(state, stop_after)
    done = fit(state, None)
    assert done == (stop_after is None)
    return whole_state(state), state.step


def _raise_signal_after(state: TrainState, step: int) -> None:
    """On one rank only: the others must learn of it."""
    forward = state.engine.step

    def stepping(done: int) -> bool:
        if done + 1 == step and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(done)

    state.engine.step = stepping  # type: ignore[method-assign]


EVERY_CONFIG = ["zero0_fp32", *(f"zero{stage}_{kind}" for stage in (1, 2, 3) for kind in ("fp32", "bf16", "fp16"))]
EVERY_CONFIG += ["zero3_bf16_offload"]
STOPPED = ("momentum_both", "gradient_both", "momentum_sharded_queue")
PAIRED_STOPS = [("zero0_fp32", STOPPED[0]), ("zero3_bf16_offload", STOPPED[0])]
PAIRED_STOPS += [
    (f"zero{stage}_{kind}", STOPPED[(stage + i) % 3])
    for stage in (1, 2, 3)
    for i, kind in enumerate(("fp32", "bf16", "fp16"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "contrast"), product(EVERY_CONFIG, STOPPED, suite=PAIRED_STOPS))
def test_a_stopped_run_goes_on_bit_equal(
    corpus: Path, tmp_path: Path, fp16_on_cpu: None, config: str, contrast: str
) -> None:
    """With a dry run before it goes on, which leaves nothing behind."""
    overrides = [f"engine={CONFIGS / config}.json", *CONTRASTS[contrast]]
    whole = run_ranks(_train, 2, small_recipe(corpus, tmp_path / "whole", *overrides), None)
    recipe = small_recipe(corpus, tmp_path / "stopped", *overrides)
    stopped = run_ranks(_train, 2, recipe, 3)
    assert all(step == 3 for _, step in stopped)
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == "step-00000003"
    resumed = run_ranks(_train, 2, small_recipe(corpus, tmp_path / "stopped", *overrides, "memory.dry_run=true"), None)
    for (expected, _), (value, step) in zip(whole, resumed, strict=True):
        assert step == 6
        for name in expected:
            assert torch.equal(value[name], expected[name]), name
