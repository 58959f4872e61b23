"""Each watchdog finds its fault and says it once in a run; a healthy run has none."""

from __future__ import annotations

import json
import lzma
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.engine import Engine
from infoxlm_ds.losses.diagnostics import describe_space
from infoxlm_ds.monitor.meters import Meter
from infoxlm_ds.monitor.watchdogs import WATCHDOGS, Seen, Watchdogs
from infoxlm_ds.train import main
from infoxlm_ds.trouble import pointer
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks
from tests.integration.commands import read_metrics, train_here, write_recipe
from tests.trouble import leads_to

ENTRIES = {
    "collapse": leads_to("The contrast has collapsed"),
    "chance": leads_to("The loss stays at ln N"),
    "saturated": leads_to("The contrast is solved"),
    "stale_queue": leads_to("Keys of the queue are stale"),
    "frozen_keys": leads_to("The key encoder stands still"),
    "temperature": leads_to("The temperature is at a bound"),
    "language": leads_to("One language gets nothing"),
    "spike": leads_to("A loss jumps"),
    "data_wait": leads_to("It is slow"),
    "slow_rank": leads_to("It is slow"),
    "memory": leads_to("Out of memory"),
    "checkpoints": leads_to("It is slow"),
}
DEMO = Path(__file__).with_name("demo.jsonl.xz")  # the lines of a run of the demo, without those of pairs


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Recipe:
    return small_recipe(corpus, tmp_path / "run", "optimizer.steps=1000")


def _demo() -> list[dict[str, Any]]:
    return [json.loads(line) for line in lzma.open(DEMO, "rt", encoding="utf-8")]


def _named(watchdogs: Watchdogs, *rows: dict[str, Any]) -> list[str]:
    warnings = [warned for row in rows for warned in watchdogs.look(row)]
    assert all(pointer(warned.text) == f" {ENTRIES[warned.name]}" for warned in warnings)
    return [warned.name for warned in warnings]


def _said(run: Path) -> dict[str, str]:
    warnings = [row for row in read_metrics(run) if "warning" in row]
    assert len({row["warning"] for row in warnings}) == len(warnings), "each once"
    return {str(row["warning"]): str(row["text"]) for row in warnings}


def test_a_healthy_run_has_none(recipe: Recipe) -> None:
    languages = {name for row in _demo() for name in row.get("languages", {}).get("mmlm", {})}
    shares = {"mmlm": dict.fromkeys(languages, 1 / len(languages))}
    assert _named(Watchdogs(Seen(recipe, shares, {}, memory=6)), *_demo()) == []


def test_real_runs_say_each_fault_once_also_when_they_go_on(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A key encoder that never moves, a temperature that leaves nothing to learn, and a save after each step."""
    run = tmp_path / "run"
    path = write_recipe(corpus, run, probe=None)
    faulty = ("contrast.momentum=1.0", "contrast.temperature=100", "contrast.learn_temperature_within=[50,100]")
    common = (*faulty, "checkpoint.every=1", "log.geometry=1", "log.tensorboard=false")
    run_ranks(train_here, 1, path, *common, "optimizer.steps=8")
    said, screen = _said(run), capfd.readouterr().out
    assert all(f"warning: {text} {ENTRIES[name]}" in screen for name, text in said.items())
    assert {"frozen_keys", "chance", "temperature", "checkpoints"} <= said.keys()
    assert said["frozen_keys"] == (
        "the key encoder stands still: no weight changed in two logged steps: set contrast.momentum below 1"
    )
    more = ("optimizer.steps=12", "resume.allow_change=[optimizer.steps]")
    run_ranks(train_here, 1, path, *common, *more)
    assert read_metrics(run)[-1]["step"] == 12
    assert _said(run).items() >= said.items()


def _slow_on_rank_1(rank: int, world: int, path: Path) -> int:
    forward = Engine.forward

    def slowly(engine: Engine, *args: Any) -> Any:
        time.sleep(0.05 * rank)
        return forward(engine, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "forward", slowly)
        return main([str(path), "optimizer.steps=6", "contrast.momentum=0.0", "contrast.queue.size=120"])


def test_a_slow_rank_is_named_and_so_are_keys_of_another_encoder(corpus: Path, tmp_path: Path) -> None:
    """Without momentum, each step has another key encoder."""
    run = tmp_path / "run"
    run_ranks(_slow_on_rank_1, 2, write_recipe(corpus, run, probe=None))
    said = _said(run)
    assert "of rank 1 take" in said["slow_rank"]
    assert pointer(said["stale_queue"]) == f" {ENTRIES['stale_queue']}"
    assert "stale: 2 steps old on average, and their encoder stays alike for 1" in said["stale_queue"]


def test_collapsed_vectors_are_found(recipe: Recipe) -> None:
    row = {"step": 5, "seconds": 1.0}
    for nearly, expected in ((1e-3, ["collapse"]), (1.0, [])):
        vectors = torch.ones(64, 32) + nearly * torch.randn(64, 32)
        space = {f"xlco/{name}": float(value) for name, value in describe_space(vectors, vectors, None).items()}
        assert _named(Watchdogs(Seen(recipe)), *[row] * 4, row | space) == expected


def test_a_solved_contrast_is_found(recipe: Recipe) -> None:
    row = {"step": 5, "seconds": 1.0, "xlco/gradient_share": 0.01, "xlco/accuracy": 1.0}
    watchdogs = Watchdogs(Seen(recipe))
    assert _named(watchdogs, *[row] * 4) == []
    assert _named(watchdogs, *[row] * 3) == ["saturated"]
    assert watchdogs.held["saturated"] == 3


def test_a_language_that_is_never_read_is_found(recipe: Recipe) -> None:
    """By what the meter counts: 5,000 pairs a line, of which Korean has a quarter."""
    sides = {"de-en": ("de", "en"), "en-ko": ("en", "ko")}
    shares = {"xlco": {"de": 0.25, "en": 0.5, "ko": 0.25}}
    watchdogs, meter = Watchdogs(Seen(recipe, shares, sides)), Meter()
    found = []
    for step in range(1, 10):
        meter.count_languages({"xlco": np.array([["de-en"]] * 5000)})
        row = {"step": step, "seconds": 1.0, "languages": meter.collect().languages}
        found += [(step, warned) for warned in watchdogs.look(row)]
    ((step, warned),) = found
    assert (step, warned.name) == (5, "language")
    assert warned.text.startswith("xlco reads nothing in ko: 12,500 texts were expected")


def test_a_jump_of_a_loss_is_found_but_not_the_queue_that_comes_in(recipe: Recipe) -> None:
    rows = [row for row in _demo() if "seconds" in row]
    jump = rows[40] | {"mmlm/loss": rows[40]["mmlm/loss"] + 2}
    assert _named(Watchdogs(Seen(recipe)), *rows[:40], jump, *rows[41:]) == ["spike"]
    harder = [row | {"xlco/loss": row["xlco/loss"] + 5, "xlco/negatives": 131072.0} for row in rows[40:]]
    assert _named(Watchdogs(Seen(recipe)), *rows[:40], *harder) == []


def test_waiting_for_data_is_found(recipe: Recipe) -> None:
    rows = [row | {"speed/data_wait_share": 0.06} for row in _demo() if "seconds" in row]
    assert _named(Watchdogs(Seen(recipe)), *rows) == ["data_wait"]


@pytest.mark.parametrize(("growth", "found"), [(0.1, ["memory"]), (0.001, [])])
def test_memory_that_would_be_full_before_the_end_is_found(recipe: Recipe, growth: float, found: list[str]) -> None:
    rows = [{"step": n, "seconds": 1.0, "memory/peak": 8 + growth * n} for n in range(60)]
    assert _named(Watchdogs(Seen(recipe, memory=24)), *rows) == found


def test_each_has_a_name_and_a_remedy() -> None:
    assert [dog.name for dog in WATCHDOGS] == list(ENTRIES)
    assert all(dog.remedy for dog in WATCHDOGS)
