"""A run comes back on another number of ranks, or at the other of ZeRO's stages 1 and 2: the same batches, losses
within rounding."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.checkpoint.store import Store, universal_of
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.engine.engine import start_ranks
from infoxlm_ds.trainer import save, train_step
from tests.corpus import ROOT, small_recipe
from tests.data.test_loader import content
from tests.distributed.masters import assert_close, distance, whole_state
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
PAIRED = [((1, 1), (2, 1)), ((1, 1), (2, 4)), ((2, 2), (1, 2)), ((2, 2), (4, 2)), ((3, 3), (2, 1)), ((3, 3), (2, 4))]
PAIRED += [((0, 0), (2, 1)), ((2, 1), (2, 4)), ((1, 2), (4, 1))]


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


@pytest.mark.slow
def test_a_conversion_changes_no_bit_and_is_made_once(
    corpus: Path, tmp_path: Path, origin: Origin, capfd: pytest.CaptureFixture[str]
) -> None:
    """On one rank stages 1 and 2 are the same computation."""
    second = _engine("zero2_fp32")
    folder, expected = origin("zero1_fp32", 1)
    newest = Store(_back_at_the_cut(folder, tmp_path / "run")).at()
    capfd.readouterr()
    losses, _, state = run_ranks(_steps, 1, small_recipe(corpus, tmp_path / "run", second), STEPS)[0]
    assert losses == expected[0][CUT:]
    assert all(torch.equal(value, expected[2][name]) for name, value in state.items())
    said = capfd.readouterr().out
    assert f"{newest.name} was written by 1 rank(s) at ZeRO 1; for 1 rank(s) at ZeRO 2 it is converted" in said

    Store(tmp_path / "run").point_to(newest)  # as if the run had been killed before it saved
    assert run_ranks(_steps, 1, small_recipe(corpus, tmp_path / "run", second), STEPS)[0][0] == losses
    assert "it was converted before" in capfd.readouterr().out
    damaged = next(universal_of(newest).glob("zero/*/fp32.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    Store(tmp_path / "run").point_to(newest)
    assert run_ranks(_steps, 1, small_recipe(corpus, tmp_path / "run", second), STEPS)[0][0] == losses
    assert "it is converted" in capfd.readouterr().out


def _refused(rank: int, world: int, recipe: Recipe) -> str:
    start_ranks()
    with pytest.raises(UserError) as caught:
        build(agreed_inputs(recipe))
    return str(caught.value)


@pytest.mark.slow
def test_a_disk_too_full_to_convert_is_said_and_harms_nothing(corpus: Path, tmp_path: Path, small_disk: Path) -> None:
    run_ranks(_steps, 2, small_recipe(corpus, small_disk), CUT)
    newest = Store(small_disk).at()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    for message in run_ranks(_refused, 1, small_recipe(corpus, small_disk)):
        assert "cannot be converted" in message and "start 2 ranks at ZeRO 1" in message
    assert not universal_of(newest).exists()
    (small_disk / "ballast").unlink()
    assert len(run_ranks(_steps, 2, small_recipe(corpus, small_disk), STEPS)[0][0]) == STEPS - CUT
