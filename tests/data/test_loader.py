"""The loader gives each rank its lanes, gives the same batches for every world size, and resumes from any step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.loader import Cursors, Loader
from tests.corpus import small_recipe

STEPS, LANES = 8, 8


@pytest.fixture(scope="module")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    batch = (f"batch.lanes={LANES}", "batch.xlco_pairs=4", "contrast.queue.size=64", "contrast.mixup=paper")
    return small_recipe(corpus, tmp_path_factory.mktemp("loader") / "run", *batch)


@pytest.fixture(scope="module")
def unbroken(recipe: Recipe) -> list[list[bytes]]:
    """The micro-batches of all lanes of the first steps, from one rank that was never stopped."""
    return read(recipe, 1, range(STEPS), {})


def content(micro: JointBatch) -> bytes:
    """Everything that a step can depend on."""
    keys = micro.keys.ids if micro.keys is not None else micro.rows[:0]
    tensors = (micro.tokens.ids, micro.tokens.layout.lengths, keys, micro.rows, micro.labels, micro.text_ids)
    names = {task: of_task.tolist() for task, of_task in micro.names.items()}
    return b"".join(x.numpy().tobytes() for x in tensors) + repr((micro.trunk.tokens, micro.mmlm, names)).encode()


def read(recipe: Recipe, world: int, steps: range, cursors: Cursors) -> list[list[bytes]]:
    """The global batches of `steps`, lane by lane. `cursors` go through JSON, are restored, and are
    updated at the end."""
    tree = json.loads(json.dumps(cursors))
    before = {task: {int(lane): tuple(at) for lane, at in lanes.items()} for task, lanes in tree.items()}
    found = [[b""] * LANES for _ in steps]
    for rank in range(world):
        loader = Loader(recipe, Corpus(recipe.corpus), rank, world)
        if before:
            loader.restore(steps.start, before)
        for step in found:
            for lane, micro in zip(loader.lanes, next(loader), strict=True):
                step[lane] = content(micro)
        for task, lanes in loader.cursors.items():
            cursors.setdefault(task, {}).update(lanes)
        loader.close()
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_are_the_same_for_every_world_size(
    recipe: Recipe, unbroken: list[list[bytes]], world: int
) -> None:
    assert read(recipe, world, range(STEPS), {}) == unbroken
    assert len({micro for step in unbroken for micro in step}) == STEPS * LANES


@given(stop=st.integers(1, STEPS - 1), worlds=st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 2))
@settings(max_examples=6, deadline=None)
def test_stopping_anywhere_and_going_on_at_any_world_size_changes_nothing(
    recipe: Recipe, unbroken: list[list[bytes]], stop: int, worlds: tuple[int, int]
) -> None:
    cursors: Cursors = {}
    first = read(recipe, worlds[0], range(stop), cursors)
    assert first + read(recipe, worlds[1], range(stop, STEPS), cursors) == unbroken


@given(stop=st.integers(1, STEPS - 1), worlds=st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 2))
@settings(max_examples=4, deadline=None)
def test_stopping_in_any_stage_changes_nothing(recipe: Recipe, stop: int, worlds: tuple[int, int]) -> None:
    sampling = {"alpha": 1, "window_packs": 1, "stages": [{"from_step": 2, "alpha": 0}, {"from_step": 5, "alpha": 0.5}]}
    masking = {"stages": [{"from_step": 3, "probability": 0.5}, {"from_step": 6, "probability": 0.1}]}
    tree = recipe.model_dump(exclude={"optimizer"}) | {"optimizer": recipe.optimizer.model_dump() | {"steps": STEPS}}
    staged = Recipe.model_validate(tree | {"sampling": sampling, "masking": masking})
    cursors: Cursors = {}
    halves = read(staged, worlds[0], range(stop), cursors) + read(staged, worlds[1], range(stop, STEPS), cursors)
    assert halves == read(staged, 1, range(STEPS), {})


def test_the_position_counts_what_was_consumed_not_what_was_made_ahead(recipe: Recipe) -> None:
    one_step: Cursors = {}
    read(recipe, 1, range(1), one_step)
    loader = Loader(recipe, Corpus(recipe.corpus), 0, 1)
    assert all(at == (0, 0) for lanes in loader.cursors.values() for at in lanes.values())
    micros = [next(loader) for _ in range(2)]
    loader.close()
    resumed = Loader(recipe, Corpus(recipe.corpus), 0, 1)
    resumed.restore(1, one_step)
    assert list(map(content, next(resumed))) == list(map(content, micros[1]))
    assert resumed.cursors == loader.cursors
    resumed.close()


def test_a_world_that_does_not_divide_the_lanes_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"batch\.lanes is 8, which 3 ranks do not divide"):
        Loader(recipe, Corpus(recipe.corpus), 0, 3)


def test_damage_that_is_met_ahead_reaches_who_asks_for_the_batch(corpus: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    shard = damaged / "nway.rows" / "nway.rows-00000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    loader = Loader(small_recipe(damaged, tmp_path / "run"), Corpus(damaged), 0, 1)
    with pytest.raises(UserError, match=r"nway\.rows-00000\.tar: the pack at byte 0 is damaged"):
        for _ in range(20):
            next(loader)
