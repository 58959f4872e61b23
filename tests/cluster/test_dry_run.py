"""`infoxlm train --dry-run` finds what the ranks would find, starts nothing and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infoxlm_ds.cluster import dry_run, launch
from tests.distributed.ranks import run_ranks
from tests.integration.commands import infoxlm_here, train_here, write_recipe


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch, "_here", start)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _mistake(*arguments: str | Path) -> str:
    done = infoxlm_here("train", *arguments, "--dry-run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_it_says_what_a_run_would_do(corpus: Path, tmp_path: Path) -> None:
    recipe = write_recipe(corpus, tmp_path / "run")
    before = _files(tmp_path), _files(corpus)
    done = infoxlm_here("train", recipe, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert (_files(tmp_path), _files(corpus)) == before and not (tmp_path / "run").exists()
    for part in (
        "xlco: 144 items of nway.rows, 0.44 passes",
        "  texts: ko 24.4%, en ",
        f"run: {tmp_path / 'run'}, starts",
        "steps: 6 of ",
        "ranks: 2 (this machine), 2 of 4 lanes each",
        "disk: 3 checkpoints of 0.00 GB at most",
        "0.1M parameters",
        "GiB a rank, on 2",
    ):
        assert part in done.stdout, done.stdout


def test_it_finds_what_the_ranks_would_find(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(corpus, run, probe=None)
    assert "no such recipe" in _mistake(tmp_path / "none.yaml")
    assert "is no prepared corpus" in _mistake(recipe, f"corpus={tmp_path}")
    assert "model.init" in _mistake(recipe, f"model.init={tmp_path}")
    assert "cannot be written to" in _mistake(recipe, f"run={recipe}/run")
    assert run_ranks(train_here, 1, recipe, "optimizer.steps=4") == [0]
    more = ("optimizer.steps=8", "resume.allow_change=[optimizer.steps]")
    assert "optimizer.steps" in _mistake(recipe, "optimizer.steps=8")
    assert "goes on from step-00000004" in infoxlm_here("train", recipe, *more, "--dry-run").stdout
    with monkeypatch.context() as patch:
        patch.setattr(dry_run, "checkpoint_bytes", lambda _: 10**12)
        assert "3 checkpoints of 1000.0 GB do not fit" in _mistake(recipe, *more)
    damaged = next((run / "checkpoints" / "step-00000004").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = _files(run)
    assert damaged.name in _mistake(recipe, *more)
    assert _files(run) == before
