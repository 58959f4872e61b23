"""A run records each of its starts, and a start that cannot be recorded does not end training."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.monitor.starts import STARTS, environment, read_starts, record_start
from infoxlm_ds.train import fit_and_close
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks


def _train(rank: int, world: int, recipe: Recipe) -> int:
    start_ranks()
    inputs = agreed_inputs(recipe)
    try:
        return fit_and_close(build(inputs))
    finally:
        inputs.loader.close()


def test_each_start_is_recorded_and_training_goes_on_where_it_cannot_be(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, allowed = tmp_path / "run", "resume.allow_change=[optimizer]"
    assert run_ranks(_train, 2, small_recipe(corpus, run, "optimizer.steps=2", allowed)) == [0, 0]
    assert run_ranks(_train, 1, small_recipe(corpus, run, "optimizer.steps=4", allowed)) == [0]
    starts = read_starts(run)
    assert [(start["step"], start["ranks"], start["device"]) for start in starts] == [(0, 2, "cpu"), (2, 1, "cpu")]
    assert starts[0]["versions"].keys() == {"infoxlm-ds", "torch", "deepspeed", "transformers"}
    (run / STARTS).unlink()
    (run / STARTS).mkdir()  # nothing can be written there, not even by root
    capfd.readouterr()
    assert run_ranks(_train, 1, small_recipe(corpus, run, "optimizer.steps=6", allowed)) == [0]
    assert capfd.readouterr().out.count(f"{STARTS} cannot be written: Is a directory") == 1
    assert read_starts(run) == []


def test_a_full_disk_leaves_no_half_of_a_line(small_disk: Path) -> None:
    record_start(small_disk, environment(0))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(OSError, match="No space left"):
        record_start(small_disk, environment(1) | {"system": "x" * 10_000})
    assert [start["step"] for start in read_starts(small_disk)] == [0]
    ballast.unlink()
    record_start(small_disk, environment(2))
    assert [start["step"] for start in read_starts(small_disk)] == [0, 2]


def test_the_end_says_where_things_lie_and_what_comes_next(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    text = corpus.parent / "rows.jsonl"
    probe = f"probe={{data: {text}, every: 1, pivot: ru, pairs: 20, languages: [de]}}"
    assert run_ranks(_train, 1, small_recipe(corpus, run, "contrast.momentum=1.0", probe)) == [0]
    end = capfd.readouterr().out.partition("finished: step 6, after 0:00:")[2].splitlines()
    assert any(re.fullmatch(r"  losses       mmlm [\d.]+, tlm [\d.]+, xlco [\d.]+, acc [\d.]+", line) for line in end)
    assert any(re.fullmatch(r"  best probe   [\d.]+ at step [1-6]", line) for line in end)
    warned = next(line for line in end if line.startswith("  warning"))
    assert "step 2: the key encoder stands still" in warned and "(5 lines of the log)" in warned
    assert f"  checkpoint   {run / 'checkpoints' / 'step-00000006'}" in end
    assert f"  next         infoxlm export '{run}' '{run / 'export'}'" in end
    measure = f"infoxlm eval retrieval --model '{run / 'export'}' --data {text} --pivot ru --min-pairs 2"
    assert f"{'':<15}{measure}" in end
    assert f"               infoxlm report '{run}' '{run / 'report.html'}'" in end
