"""A run that may leave out damaged packs: all ranks leave out the same, for every world size, and a stopped run too."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Recipe
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.data.stream import DamagedDraw, LeftOut
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import TooMuchDamage, save, train_step
from tests.corpus import small_recipe, write_corpus
from tests.distributed.masters import assert_close, whole_state
from tests.distributed.ranks import run_ranks

STEPS = 6
Result = tuple[dict[str, Tensor], list[LeftOut]]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of a few packs a source, of which one n-way pack and one monolingual pack is damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    corpus = write_corpus(folder, rows=2600)
    made = Corpus(corpus)
    assert all(made.sources[i].packs > 2 for i in _numbers(made))
    for number in _numbers(made):
        damage(made, number, 1)
    return corpus


def _numbers(corpus: Corpus) -> list[int]:
    names = [source.name for source in corpus.sources]
    return [names.index("nway.rows"), names.index("mono.en")]


def damage(corpus: Corpus, source: int, pack: int) -> None:
    place = corpus._range(source, pack)
    path = Path(corpus.path) / place.file.name
    data = bytearray(path.read_bytes())
    data[place.offset + place.size // 2] ^= 1
    path.write_bytes(data)


def _recipe(corpus: Path, run: Path, *overrides: str) -> Recipe:
    sizes = ("batch.mmlm_tokens=1500", "batch.tlm_tokens=1500", "batch.xlco_pairs=100", "contrast.queue.size=500")
    return small_recipe(corpus, run, "on_damage=skip", f"optimizer.steps={STEPS}", *sizes, *overrides)


def _start(recipe: Recipe) -> TrainState:
    start_ranks()
    return build(agreed_inputs(recipe))


def _train(rank: int, world: int, recipe: Recipe, until: int) -> Result:
    """Train up to a step, and save there."""
    state = _start(recipe)
    while state.step < until:
        assert train_step(state)
    save(state, None)
    state.checkpoints.finish()
    state.loader.close()
    return whole_state(state), state.loader.left_out


@pytest.mark.parametrize("windows", ["sampling.window_packs=1", "sampling.window_packs=4"], ids=["own", "shared"])
def test_all_ranks_go_on_without_the_same_packs(damaged: Path, tmp_path: Path, windows: str) -> None:
    """A window of a lane, and windows that all lanes share."""
    ((alone, left_out),) = run_ranks(_train, 1, _recipe(damaged, tmp_path / "one", windows), STEPS)
    assert {"nway.rows 1"} <= {what.pack for what in left_out} <= {"nway.rows 1", "mono.en 1"}
    for result, same in run_ranks(_train, 2, _recipe(damaged, tmp_path / "two", windows), STEPS):
        assert sorted(same) == sorted(left_out)
        for name, value in result.items():
            assert_close(value, alone[name], name)


def test_a_stopped_run_remembers_what_it_left_out(damaged: Path, tmp_path: Path) -> None:
    """Also on another number of ranks."""
    ((whole, left_out),) = run_ranks(_train, 1, _recipe(damaged, tmp_path / "one"), STEPS)
    ((_, before),) = run_ranks(_train, 1, _recipe(damaged, tmp_path / "two"), STEPS - 1)
    assert before
    for result, after in run_ranks(_train, 2, _recipe(damaged, tmp_path / "two"), STEPS):
        assert after[: len(before)] == before and sorted(after) == sorted(left_out)
        for name, value in result.items():
            assert_close(value, whole[name], name)


def _on_one_rank(rank: int, world: int, recipe: Recipe) -> list[list[LeftOut]]:
    """Only the last rank's disk has the damage: its own reads fail, those of the others do not."""
    state = _start(recipe)
    if rank < world - 1:
        good = Corpus(Path(str(recipe.corpus).replace("damaged", "good")))
        for reader in state.loader._builder.readers.values():
            reader._corpus = good
    for _ in range(STEPS):
        assert train_step(state)
    state.loader.close()
    return dist.gather_objects(state.loader.left_out)


def test_damage_that_one_rank_sees_is_left_out_on_all(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path, rows=2600).rename(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "damaged")
    made = Corpus(tmp_path / "damaged")
    damage(made, _numbers(made)[0], 1)
    recipe = _recipe(tmp_path / "damaged", tmp_path / "run", "sampling.window_packs=4")
    for everyone in run_ranks(_on_one_rank, 2, recipe):
        assert everyone[0] == everyone[1] and {what.pack for what in everyone[0]} == {"nway.rows 1"}


def test_a_window_that_was_begun_before_the_damage_is_not_ended(tmp_path: Path) -> None:
    """Without a pack its order is another one, so items would come twice."""
    recipe = _recipe(write_corpus(tmp_path, rows=2600), tmp_path / "run", "sampling.window_packs=1")
    loader = Loader(recipe, Corpus(recipe.corpus), 0, 1)
    next(loader)
    loader.close()
    made = Corpus(recipe.corpus)
    for number in range(len(made.sources)):
        for pack in range(made.sources[number].packs):
            damage(made, number, pack)
    again = Loader(recipe, Corpus(recipe.corpus), 0, 1)
    again.restore(1, loader.cursors)
    begun = {task: dict(lanes) for task, lanes in loader.cursors.items()}
    with pytest.raises(DamagedDraw) as found:
        next(again)
    again.leave_out([found.value.what])
    (task, lane) = next(
        (task, lane) for task, lanes in begun.items() for lane in lanes if again.cursors[task][lane] != lanes[lane]
    )
    assert task == found.value.what.stream and begun[task][lane][1] > 0
    assert again.cursors[task][lane] == (begun[task][lane][0] + 1, 0)
    with pytest.raises(DamagedDraw) as other:
        next(again)
    assert other.value.what.draw != found.value.what.draw
    again.close()


def test_more_than_a_hundredth_is_too_much(damaged: Path, tmp_path: Path) -> None:
    shutil.copytree(damaged, tmp_path / "worse")
    made = Corpus(tmp_path / "worse")
    nway = _numbers(made)[0]
    for pack in np.setdiff1d(np.arange(made.sources[nway].packs), [1]).tolist():
        damage(made, nway, pack)
    with pytest.raises(TooMuchDamage, match="packs are damaged"):
        run_ranks(_train, 1, _recipe(tmp_path / "worse", tmp_path / "run", "sampling.window_packs=1"), STEPS)
