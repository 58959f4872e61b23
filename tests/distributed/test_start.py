"""How ranks start together."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest

from infoxlm_ds.build import agreed_inputs, build, check_inputs
from infoxlm_ds.checkpoint.checkpoints import Best
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.train import main
from infoxlm_ds.trainer import save, train_step
from tests.corpus import EMBEDDED, small_recipe
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
    """A shared file system would have to answer thousands of them."""
    recipe = small_recipe(corpus, tmp_path / "run", f"engine=ds_configs/{engine}.json")
    _, second = run_ranks(_start, 2, recipe)
    assert second == []
    first, second = run_ranks(_start, 2, recipe)
    assert second == [] and first


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


def _main_without_weights(rank: int, world: int, recipe: Path) -> int:
    """Rank 1 finds no weights when it builds its model."""

    def lacks(*_: object) -> None:
        raise UserError("model.init there: no weights")

    with mock.patch("infoxlm_ds.build.build_model", lacks) if rank else nullcontext():
        return main([str(recipe)])


def test_what_one_rank_lacks_while_it_builds_is_told_by_all_as_one_line(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small_recipe(corpus, tmp_path / "run")
    assert run_ranks(_main_without_weights, 2, tmp_path / "run.yaml") == [2, 2]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("infoxlm: ")]
    assert line.startswith("infoxlm: rank 1 on ") and line.endswith("model.init there: no weights")


def test_options_that_nothing_reads_are_said(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["contrast.keys=gradient", "contrast.negatives=in_batch", "sampling={pivot: en, pivot_share: 0.5}"]
    recipe = small_recipe(corpus, tmp_path / "run", *overrides)
    check_inputs(recipe, 1, 2)
    assert "no effect" not in capsys.readouterr().out
    check_inputs(recipe, 0, 2)
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    assert said == ["contrast.momentum", "contrast.queue"]  # the corpus has n-way rows with en


def _best(rank: int, world: int, recipe: Recipe, best: Best | None) -> Best | None:
    start_ranks()
    state = build(agreed_inputs(recipe))
    if best is not None:
        state.best = best
        train_step(state)
        save(state, None)
    state.loader.close()
    return state.best


def test_the_best_probe_is_forgotten_when_another_is_measured(corpus: Path, tmp_path: Path) -> None:
    probe = f"probe={{data: {EMBEDDED}/home_assistant.dev.jsonl.xz, languages: [de, ru], pairs: 20, every: 3}}"
    recipe = small_recipe(corpus, tmp_path / "run", probe)
    best = Best(1, 0.5)
    run_ranks(_best, 1, recipe, best)
    assert run_ranks(_best, 1, small_recipe(corpus, tmp_path / "run", probe, "probe.every=4"), None) == [best]
    assert run_ranks(_best, 1, small_recipe(corpus, tmp_path / "run", probe, "probe.pairs=30"), None) == [None]
