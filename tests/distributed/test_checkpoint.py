"""What `latest` names is whole, and a run folder has one owner."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from infoxlm_ds import dist
from infoxlm_ds.checkpoint import Checkpoints
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.engine import start_ranks
from infoxlm_ds.train import build, check_inputs
from infoxlm_ds.trainer import _save, fit, train_step
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks


def _fit(rank: int, world: int, recipe: Recipe) -> None:
    start_ranks()
    fit(build(check_inputs(recipe, dist.rank(), dist.world_size())), None)


def _refused(rank: int, world: int, recipe: Recipe) -> str:
    start_ranks()
    with pytest.raises(UserError) as caught:
        build(check_inputs(recipe, dist.rank(), dist.world_size()))
    return str(caught.value)


@pytest.fixture
def half_way(corpus: Path, tmp_path: Path) -> Path:
    """A run folder with the committed checkpoints of step 2 of 2."""
    run_ranks(_fit, 2, small_recipe(corpus, tmp_path / "run", "optimizer.steps=2"))
    return tmp_path / "run" / "checkpoints" / "step-00000002"


@pytest.mark.parametrize("pattern", ["queue-00000.*", "momentum-00001.safetensors", "*pp_rank_1_*optim_states.pt"])
def test_a_flipped_bit_in_a_checkpoint_is_named_by_all_ranks(corpus: Path, half_way: Path, pattern: str) -> None:
    (damaged,) = half_way.glob(pattern)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    for message in run_ranks(_refused, 2, small_recipe(corpus, half_way.parents[1], "optimizer.steps=2")):
        assert damaged.name in message and "latest" in message


@pytest.mark.parametrize(
    ("world", "override", "words"),
    [
        (2, "optimizer.learning_rate=0.5", "another optimizer"),
        (2, "seed=9", "another seed"),
        (1, "optimizer.steps=2", "finished"),
    ],
)
def test_a_run_folder_belongs_to_one_recipe(
    corpus: Path, half_way: Path, world: int, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(corpus, half_way.parents[1], "optimizer.steps=2", override)
    if words == "finished":  # whatever the number of ranks
        assert check_inputs(recipe, 0, world).finished
        assert words in capsys.readouterr().out
        return
    with pytest.raises(UserError, match=words):
        check_inputs(recipe, 0, world)


def _resized(rank: int, world: int, recipe: Recipe) -> tuple[list[float], list[int]]:
    start_ranks()
    state = build(check_inputs(recipe, dist.rank(), dist.world_size()))
    assert state.queue is not None
    filled = [state.queue.filled]
    while state.step < 5:
        assert train_step(state)
        filled.append(state.queue.filled)
    return filled, sorted(state.queue.steps.tolist())


@pytest.mark.parametrize(("size", "sharded"), [(70, False), (70, True), (30, False), (40, True)])
def test_a_queue_of_another_size_goes_on_with_the_newest_keys(
    corpus: Path, tmp_path: Path, size: int, sharded: bool
) -> None:
    """24 keys a step: after two steps the queue of 40 is full."""
    run_ranks(_stop_after_two, 2, small_recipe(corpus, tmp_path / "run"))
    recipe = small_recipe(
        corpus, tmp_path / "run", f"contrast.queue.size={size}", f"contrast.queue.sharded={str(sharded).lower()}"
    )
    results = run_ranks(_resized, 2, recipe)
    expected = [min(1.0, (40 + 24 * step) / size) for step in range(4)]
    assert [filled for filled, _ in results] == [expected, expected]
    steps = sorted(step for _, held in (results if sharded else results[:1]) for step in held)
    assert steps == sorted([5] * 24 + [4] * 24 + [3] * 24)[-size:]


def test_a_larger_queue_that_could_not_fill_is_refused(corpus: Path, tmp_path: Path) -> None:
    run_ranks(_stop_after_two, 2, small_recipe(corpus, tmp_path / "run"))
    for message in run_ranks(_refused, 2, small_recipe(corpus, tmp_path / "run", "contrast.queue.size=143")):
        assert "contrast.queue.size 143" in message and "4 steps" in message


def test_another_number_of_ranks_is_refused_before_the_end(corpus: Path, tmp_path: Path) -> None:
    short = small_recipe(corpus, tmp_path / "run", "optimizer.steps=3")
    run_ranks(_stop_after_two, 2, short)
    with pytest.raises(UserError, match="written by 2 ranks, not 1"):
        check_inputs(short, 0, 1)


def _stop_after_two(rank: int, world: int, recipe: Recipe) -> None:
    start_ranks()
    state = build(check_inputs(recipe, dist.rank(), dist.world_size()))
    train_step(state)
    train_step(state)
    _save(state)


def test_a_second_process_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path / "run", keep=1)
    first.lock()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def second() -> None:
        try:
            Checkpoints(tmp_path / "run", keep=1).lock()
        except UserError as error:
            answers.put(str(error))

    process = context.Process(target=second)
    process.start()
    assert "another process trains in" in answers.get(timeout=30)
    process.join()
