"""The model of a GPU's time, and MFU."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from infoxlm_ds import reporting
from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.cli import app
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.planner.cost import flops
from infoxlm_ds.planner.report import Wishes, read_setting
from infoxlm_ds.planner.speed import ASSUMED, GPUS, Gpu, known_gpu, step_seconds, tokens_per_second
from infoxlm_ds.planner.workload import Setting, Shape, read_text
from infoxlm_ds.trainer import train_step
from tests.corpus import ROOT, small_recipe
from tests.distributed.ranks import run_ranks


def test_devices_are_known_by_their_names() -> None:
    assert known_gpu("NVIDIA H100 80GB HBM3") == ASSUMED
    assert known_gpu("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize("name", ["base", "large"])
def test_no_part_is_free_and_no_gpu_exceeds_its_peak(name: str) -> None:
    s = read_setting(ROOT / "recipes" / f"{name}.yaml", [], Wishes(8, vocabulary=250_002))
    for gpu in GPUS:
        parts = step_seconds(s, gpu)
        assert all(seconds > 0 for seconds in parts.values())
    assert tokens_per_second(s, GPUS[0]) > tokens_per_second(s, ASSUMED) > tokens_per_second(s, GPUS[3])


def test_the_plan_says_tokens_a_second_and_mfu() -> None:
    result = CliRunner().invoke(app, ["plan", str(ROOT / "recipes" / "base.yaml"), "--gpus", "8"])
    assert "tokens/s and an MFU of" in result.output and "no GPU has confirmed" in result.output


def _logged(rank: int, world: int, recipe: Recipe) -> tuple[dict[str, float], dict[str, float]]:
    """The scalars of a log line on a GPU with a peak of 1e12 operations a second, and the operations of a step."""
    start_ranks()
    state = build(agreed_inputs(recipe))
    assert train_step(state)
    written: dict[str, float] = {}

    class Written:
        def write(self, step: int, values: dict[str, float], more: dict[str, float], _: object) -> None:
            written.update(values, seconds=more["seconds"])

        def progress(self, *_: object) -> None: ...

    reporting.this_gpu = lambda: Gpu("pretended", 1e12, 1e12)
    reporting.log(state, Written() if rank == 0 else None, 1.0)  # type: ignore[arg-type]
    text = read_text(recipe)
    return written, flops(Setting(recipe, state.identity.engine, Shape.of(recipe, text.vocabulary), text, world))


def test_the_log_says_mfu_where_the_peak_is_known(corpus: Path, tmp_path: Path) -> None:
    values, operations = run_ranks(_logged, 2, small_recipe(corpus, tmp_path / "run"))[0]
    useful = sum(operations.values()) - operations["recomputed"]
    assert values["speed/mfu"] == pytest.approx(useful / (values["seconds"] * 2e12))
