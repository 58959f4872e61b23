"""How ranks start together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.engine import start_ranks
from infoxlm_ds.train import main
from infoxlm_ds.trainer import save, train_step
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks


def _start(rank: int, world: int, recipe: Recipe) -> list[str]:
    """Train a step and save. Which folders of the run and the corpus were listed before that."""
    listed: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.listdir", "os.scandir"):
            listed.append(str(arguments[0]))

    start_ranks()
    sys.addaudithook(watch)
    state = build(agreed_inputs(recipe))
    seen = [path for path in listed if path.startswith((str(recipe.run), str(recipe.corpus)))]
    train_step(state)
    save(state, None)
    state.loader.close()
    return seen


@pytest.mark.parametrize("engine", ["zero1_fp32", "zero3_fp32"])
def test_no_rank_but_the_first_lists_a_folder_to_start_or_to_go_on(corpus: Path, tmp_path: Path, engine: str) -> None:
    """A shared file system would have to answer thousands of them. DeepSpeed lists the checkpoint that it loads."""
    recipe = small_recipe(corpus, tmp_path / "run", f"engine=ds_configs/{engine}.json")
    _, second = run_ranks(_start, 2, recipe)
    assert second == []
    first, second = run_ranks(_start, 2, recipe)
    assert second == [str(recipe.run / "checkpoints" / "step-00000001")]
    assert len(first) > len(second)


def _main(rank: int, world: int, recipe: Path, corpora: list[Path]) -> int:
    return main([str(recipe), f"corpus={corpora[rank]}"])


def test_what_one_rank_lacks_ends_all_with_one_line(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small_recipe(corpus, tmp_path / "run")
    gone = tmp_path / "gone"
    for corpora, words in [([corpus, gone], "rank 1 on "), ([gone, gone], f"infoxlm: {gone} is no prepared corpus")]:
        assert run_ranks(_main, 2, tmp_path / "run.yaml", corpora) == [2, 2]
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("infoxlm: ")]
        assert words in line and "is no prepared corpus" in line
    assert not (tmp_path / "run").exists()
