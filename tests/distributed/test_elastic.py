"""A run comes back on another number of ranks and with another engine configuration: the same state bit by bit, the
same batches, losses within rounding."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.checkpoint.store import Store
from infoxlm_ds.config import Recipe
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import save, train_step
from tests.corpus import ROOT, small_recipe
from tests.data.test_loader import content
from tests.distributed.masters import assert_close, checkpointed_state, distance, whole_state
from tests.distributed.products import cases
from tests.distributed.ranks import run_ranks

CUT, STEPS = 3, 6  # the cluster changes behind step 3
Trained = tuple[list[float], list[dict[int, bytes]], dict[str, Tensor]]


def _engine(name: str) -> str:
    return f"engine={ROOT / 'ds_configs' / name}.json"


def _steps(rank: int, world: int, recipe: Recipe, to: int) -> Trained:
    """Train to a step and save. Losses of the steps, what each of this rank's lanes was given, the whole state."""
    start_ranks()
    given: list[dict[int, bytes]] = []
    take = Loader.__next__

    def watched(loader: Loader) -> list[JointBatch]:
        micros = take(loader)
        given.append({lane: content(micro) for lane, micro in zip(loader.lanes, micros, strict=True)})
        return micros

    Loader.__next__ = watched  # type: ignore[method-assign, assignment]  # in this fork alone
    state = build(agreed_inputs(recipe))
    losses = []
    while state.step < to:
        while not train_step(state):
            pass
        losses.append(state.meter.collect()[0]["loss"])
        if state.step in (CUT, to):
            save(state, None)
    state.loader.close()
    return losses, given, whole_state(state)


def _together(results: list[Trained]) -> Trained:
    """Of all ranks: the losses, every step's lanes, the state."""
    steps = [
        {lane: x for of_rank in step for lane, x in of_rank.items()}
        for step in zip(*(r[1] for r in results), strict=True)
    ]
    return results[0][0], steps, results[0][2]


Origin = Callable[..., tuple[Path, Trained]]


@pytest.fixture(scope="module")
def origin(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """The folder and the course of a run, by engine, number of ranks and overrides, that was saved at CUT and went
    on."""

    @functools.cache
    def run(config: str, ranks: int, *overrides: str) -> tuple[Path, Trained]:
        folder = tmp_path_factory.mktemp("origin") / "run"
        recipe = small_recipe(corpus, folder, _engine(config), *overrides)
        return folder, _together(run_ranks(_steps, ranks, recipe, STEPS))

    return run


def _back_at_the_cut(origin: Path, run: Path) -> Path:
    """A copy of a run as it was at CUT."""
    shutil.copytree(origin, run)
    Store(run).point_to(Store(run).at(CUT))
    return run


CHANGES = [(2, 1), (1, 2), (2, 4), (4, 2)]
SPLITS = [((stage, stage), change) for stage in (1, 2, 3) for change in CHANGES]
SPLITS += [((0, 0), (2, 1)), ((0, 0), (1, 2)), ((1, 2), (2, 2)), ((2, 1), (2, 4)), ((1, 2), (4, 1))]
SPLITS += [((0, 3), (2, 1)), ((3, 1), (1, 2)), ((1, 0), (4, 2)), ((2, 3), (2, 2))]
PAIRED = [((1, 1), (2, 1)), ((1, 1), (2, 4)), ((2, 2), (1, 2)), ((2, 2), (4, 2)), ((3, 3), (2, 1)), ((3, 3), (2, 4))]
PAIRED += [((0, 0), (2, 1)), ((2, 1), (2, 4)), ((1, 2), (4, 1)), ((0, 3), (2, 1)), ((3, 1), (1, 2)), ((1, 0), (4, 2))]


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "ranks"), cases(SPLITS, PAIRED))
def test_a_run_goes_on_with_another_number_of_ranks_and_at_another_stage(
    corpus: Path, tmp_path: Path, origin: Origin, stages: tuple[int, int], ranks: tuple[int, int]
) -> None:
    """As the run that never changed: the same batches item by item, everything within the rounding of sums."""
    folder, expected = origin(f"zero{stages[0]}_fp32", ranks[0])
    recipe = small_recipe(corpus, _back_at_the_cut(folder, tmp_path / "run"), _engine(f"zero{stages[1]}_fp32"))
    losses, given, state = _together(run_ranks(_steps, ranks[1], recipe, STEPS))
    assert given == expected[1][CUT:]
    assert losses == pytest.approx(expected[0][CUT:], rel=1e-5)
    for name, value in state.items():
        assert_close(value, expected[2][name], name)


Setting = tuple[str, int]  # an engine configuration, and ranks
ENGINES = ["zero0_fp32", *(f"zero{n}_{p}" for n in (1, 2, 3) for p in ("fp32", "bf16", "fp16"))]
ENGINES += ["zero2_bf16_offload", "zero3_bf16_offload"]
SETTINGS = list(itertools.product(ENGINES, (1, 2, 4)))
# Each value of stage, precision, offloading and number of ranks with each other value, of both sides: all pairs.
SUITE: dict[Setting, list[Setting]] = {
    ("zero1_fp16", 2): [("zero2_bf16_offload", 2), ("zero3_fp16", 4), ("zero1_bf16", 1)],
    ("zero2_bf16_offload", 4): [("zero2_fp32", 4)],
    ("zero0_fp32", 1): [("zero1_fp32", 1), ("zero2_fp16", 2)],
    ("zero3_bf16_offload", 1): [("zero3_bf16_offload", 2), ("zero2_bf16_offload", 4)],
    ("zero3_fp16", 4): [("zero0_fp32", 1), ("zero1_fp16", 2)],
    ("zero2_bf16_offload", 2): [("zero1_fp16", 1), ("zero0_fp32", 2)],
    ("zero2_fp32", 4): [("zero3_bf16_offload", 4)],
    ("zero1_bf16", 1): [("zero0_fp32", 4), ("zero2_fp32", 1)],
    ("zero0_fp32", 2): [("zero0_fp32", 2), ("zero3_bf16_offload", 1), ("zero1_bf16", 4)],
    ("zero2_fp16", 1): [("zero3_fp32", 2)],
    ("zero3_fp32", 2): [("zero3_bf16", 2)],
    ("zero1_fp32", 4): [("zero2_fp32", 1)],
    ("zero0_fp32", 4): [("zero2_bf16", 1)],
}


def test_the_suite_has_all_pairs_of_values() -> None:
    def pairs(then: Setting, now: Setting) -> set[Any]:
        values = [
            (side, *value)
            for side, (engine, ranks) in (("then", then), ("now", now))
            for value in (("stage", engine[4]), ("in", engine[6:10]), ("offload", engine[10:]), ("ranks", ranks))
        ]
        return set(itertools.combinations(sorted(values, key=str), 2))

    everything = set().union(*(pairs(then, now) for then, now in itertools.product(SETTINGS, SETTINGS)))
    chosen = set().union(*(pairs(then, now) for then, of_one in SUITE.items() for now in of_one))
    assert chosen == everything


Loaded = tuple[dict[str, Tensor], dict[str, Any]]  # a run's tensors, and its counters


def _loaded(rank: int, world: int, recipe: Recipe, configs: list[str]) -> list[Loaded]:
    """The state that each of these engines has when it begins."""
    start_ranks()
    states = []
    for config in configs:
        state = build(agreed_inputs(recipe.model_copy(update={"engine": ROOT / "ds_configs" / f"{config}.json"})))
        states.append((checkpointed_state(state), state.engine.counters()))
        state.loader.close()
        _computes_with_its_masters(state)
    return states


def _computes_with_its_masters(state: TrainState) -> None:
    """The weights that compute are the masters, in the engine's precision."""
    masters = {name: x for name, x in whole_state(state, queue=False).items() if name.startswith("model.")}
    parameters = dict(state.objective.model.named_parameters(prefix="model"))
    with GatheredParameters(list(parameters.values()), enabled=state.engine.stage == 3):
        for name, parameter in parameters.items():
            assert torch.equal(parameter, masters[name].to(parameter)), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("then", "into"),
    [*SUITE.items(), *(pytest.param(s, SETTINGS, marks=pytest.mark.torture) for s in SETTINGS)],
    ids=lambda value: "{}-on-{}".format(*value) if isinstance(value, tuple) else len(value),
)
def test_a_checkpoint_loads_bit_by_bit_into_any_engine_on_any_number_of_ranks(
    corpus: Path, tmp_path: Path, fp16_on_cpu: None, then: Setting, into: list[Setting]
) -> None:
    """Masters, moments, averages, queue, learned temperature. `make torture` goes from everything to everything."""
    overrides = ("contrast.learn_temperature_within=[0.05, 0.3]", "contrast.queue.sharded=true")
    recipe = small_recipe(corpus, tmp_path / "run", _engine(then[0]), *overrides)
    saved, counters = run_ranks(_saved, then[1], recipe)[0]
    assert len(saved) > 150
    for world in (1, 2, 4):
        if configs := [config for config, ranks in into if ranks == world]:
            for of_rank in run_ranks(_loaded, world, recipe, configs, timeout=600):
                for config, (state, counted) in zip(configs, of_rank, strict=True):
                    assert state.keys() == saved.keys()
                    different = [name for name, x in saved.items() if not torch.equal(x, state[name])]
                    assert not different, f"{config} on {world} ranks: {different}"
                    assert (counted["steps"], counted["skipped"]) == (counters["steps"], counters["skipped"])
                    if "fp16" in config and "fp16" in then[0]:
                        assert counted["loss_scale"] == counters["loss_scale"] == SCALE


SCALE = {"cur_scale": 512.0, "cur_iter": 77, "last_overflow_iter": 33, "cur_hysteresis": 1}  # as none begins


def _saved(rank: int, world: int, recipe: Recipe) -> Loaded:
    start_ranks()
    state = build(agreed_inputs(recipe))
    while state.step < 2:  # the queue of 40 is full
        train_step(state)
    if state.engine.adapts_loss_scale:
        state.engine.resume(state.engine.counters() | {"loss_scale": SCALE}, state.step)
    save(state, None)
    state.loader.close()
    return checkpointed_state(state), state.engine.counters()


@pytest.mark.slow
def test_the_documented_reader_reads_what_four_ranks_wrote(corpus: Path, tmp_path: Path) -> None:
    """The program in docs/checkpoints.md, which needs neither torch nor this package."""
    recipe = small_recipe(corpus, tmp_path / "run", _engine("zero1_bf16"))
    saved, _ = run_ranks(_saved, 4, recipe)[0]
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import json.*?)```", text, re.DOTALL)
    assert len(program.splitlines()) <= 20
    program += "assert not {'torch', 'infoxlm_ds'} & set(sys.modules)\n"
    program += f"np.savez({str(tmp_path / 'out.npz')!r}, **state)\n"
    (tmp_path / "read.py").write_text(program)
    subprocess.run([sys.executable, tmp_path / "read.py", Store(recipe.run).at()], check=True, timeout=60)
    state = {name.replace("/", ".", 1): torch.from_numpy(x) for name, x in np.load(tmp_path / "out.npz").items()}
    read = {name: x for name, x in state.items() if not name.startswith("average.")}
    assert read.keys() == {name for name in saved if not name.startswith(("key.", "queue.", "applied"))}
    assert all(torch.equal(x, saved[name]) for name, x in read.items())
    averages = [x for name, x in state.items() if name.startswith("average.")]
    keys = [x for name, x in saved.items() if name.startswith("key.")]
    assert len(averages) == len(keys) and all(any(torch.equal(x, key) for key in keys) for x in averages)


# How far apart the run that changed and the one that did not are at the end, as a share of how far training moved the
# weights from their start. Measured: 5e-8, 2.7e-4 and 3e-5.
BOUNDS = {"fp32": 1e-6, "bf16": 5e-4, "fp16": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "ranks", "overrides"),
    [
        ("zero1_bf16", (2, 1), []),
        ("zero3_bf16", (2, 1), []),
        ("zero2_fp16", (1, 2), []),
        ("zero3_fp16", (1, 2), []),
        ("zero2_bf16_offload", (2, 1), []),
        ("zero1_fp32", (1, 2), ["contrast.queue.sharded=true"]),
        ("zero3_fp32", (2, 1), ["contrast.keys=gradient"]),
    ],
)
def test_it_goes_on_in_16_bits_and_with_shards_of_the_queue(
    corpus: Path,
    tmp_path: Path,
    fp16_on_cpu: None,
    origin: Origin,
    config: str,
    ranks: tuple[int, int],
    overrides: list[str],
) -> None:
    """In 16 bits the two splits differ by their rounding; the loss scale is taken over."""
    folder, expected = origin(config, ranks[0], *overrides)
    recipe = small_recipe(corpus, _back_at_the_cut(folder, tmp_path / "run"), _engine(config), *overrides)
    losses, given, state = _together(run_ranks(_steps, ranks[1], recipe, STEPS))
    assert given == expected[1][CUT:]
    if "fp32" in config:  # the queue among it
        assert losses == pytest.approx(expected[0][CUT:], rel=1e-5)
        for name, value in state.items():
            assert_close(value, expected[2][name], name)
    start = run_ranks(_untrained, 1, small_recipe(corpus, tmp_path / "new", _engine(config), *overrides))[0]
    for names in ("model.", "key."):
        ours, theirs = ({name: x for name, x in of.items() if name.startswith(names)} for of in (state, expected[2]))
        if theirs:
            apart, moved = distance(ours, theirs), distance(start, theirs)
            assert apart < BOUNDS[config.split("_")[1]] * moved, f"{names} {apart / moved:.1e}"


def _untrained(rank: int, world: int, recipe: Recipe) -> dict[str, Tensor]:
    start_ranks()
    state = build(agreed_inputs(recipe))
    state.loader.close()
    return whole_state(state, queue=False)
