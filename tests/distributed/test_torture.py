"""Kill it anywhere: SIGKILL to all ranks at random moments, most of them inside a save, and start again after each.

`make test` kills a few times, `make torture` many (`--kills`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.checkpoint.store import Store
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.train import fit_and_close
from tests.corpus import ROOT, small_recipe
from tests.distributed.masters import whole_state
from tests.distributed.ranks import run_ranks

STEPS_A_LIFE = 6  # no life gets further than this before it is killed
EVERY = 2


def _train(rank: int, world: int, recipe: Recipe) -> dict[str, Tensor]:
    """What the launcher runs, up to its end."""
    start_ranks()
    inputs = agreed_inputs(recipe)
    inputs.checkpoints.lock()
    state = build(inputs)
    assert fit_and_close(state) == 0
    return whole_state(state)


def _life(recipe: Recipe, may_be_killed: Callable[[float], bool]) -> bool:
    """Start two ranks in a process group of their own, and kill it when it may be. True if it was killed, False if it
    came to its end before."""

    leader = multiprocessing.get_context("fork").Process(target=run_ranks, args=(_train, 2, recipe))
    leader.start()
    started = time.monotonic()
    assert leader.pid is not None
    os.setpgid(leader.pid, leader.pid)  # its ranks, which it has yet to fork, will be in it
    while leader.is_alive():
        if may_be_killed(time.monotonic() - started):
            os.killpg(leader.pid, signal.SIGKILL)
            leader.join()
            return True
        time.sleep(0.0002)
    assert leader.exitcode == 0
    return False


def _moment(chance: random.Random, store: Store) -> tuple[str, Callable[[float], bool]]:
    """A moment to be killed at, and its name: in this life's first save, or in its second."""
    which = chance.choice(["start", "between", "files", "files", "manifest", "named", "pointer"])
    delay, number, second = chance.uniform(0, 2.0), chance.randint(1, 4), chance.random() < 0.5
    newest: list[Path | None] = [store.latest()]  # as this life saw it change
    named = {p.name for p in store.folder.glob("step-????????")}
    since: list[float] = []

    def now(age: float) -> bool:
        if which == "start":
            return age > delay
        if second and len(newest) == 1:
            if store.latest() != newest[0]:
                newest.append(store.latest())
                named.update(p.name for p in store.folder.glob("step-????????"))
            return False
        partials = list(store.folder.glob("step-????????.partial"))
        match which:
            case "between":  # some time after a save
                if store.latest() != newest[-1] and not since:
                    since.append(age)
                return bool(since) and age > since[0] + delay / 10
            case "files":
                return any(len(list(p.iterdir())) >= number for p in partials)
            case "manifest":
                return any((p / "manifest.json.partial").exists() or (p / "manifest.json").exists() for p in partials)
            case "named":  # committed but for `latest`
                return any(p.name not in named for p in store.folder.glob("step-????????"))
            case _:
                return (store.folder / "latest.partial").exists() or store.latest() != newest[-1]

    return f"{which}, save {1 + second}", lambda age: _safely(now, age)


def _safely(now: Callable[[float], bool], age: float) -> bool:
    try:
        return now(age)
    except FileNotFoundError:  # renamed while we looked
        return False


def _losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(logged) == len(dict(logged)), "a step was logged twice"
    return dict(logged)


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("config", "asynchronous"), [("zero1_fp32", False), ("zero3_bf16", True)])
def test_a_run_that_is_killed_again_and_again_ends_bit_equal(
    corpus: Path, tmp_path: Path, request: pytest.FixtureRequest, config: str, asynchronous: bool
) -> None:
    kills = request.config.getoption("--kills")
    overrides = [
        f"engine={ROOT / 'ds_configs' / config}.json",
        f"optimizer.steps={STEPS_A_LIFE * kills + EVERY}",
        f"checkpoint.every={EVERY}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
        "log.tensorboard=false",
    ]
    whole = run_ranks(_train, 2, small_recipe(corpus, tmp_path / "whole", *overrides), timeout=600)
    recipe = small_recipe(corpus, tmp_path / "run", *overrides)
    store, chance = Store(recipe.run), random.Random(20071)
    inside = 0
    for number in range(1, kills + 1):
        which, now = _moment(chance, store)
        assert _life(recipe, now), f"kill {number} ({which}) came too late"
        half_written = [p.name for p in store.folder.glob("step-*.partial")] if store.folder.is_dir() else []
        newest = store.latest()
        beyond = [p.name for p in store.folder.glob("step-????????") if newest is None or p.name > newest.name]
        inside += bool(half_written or beyond)
        print(f"kill {number} ({which}): newest {newest and newest.name}, left {[*half_written, *beyond]}", flush=True)
    state = run_ranks(_train, 2, recipe, timeout=600)
    print(f"{inside} of {kills} kills came inside a save")
    assert inside >= kills // 5
    assert _losses(recipe.run) == _losses(tmp_path / "whole")
    for ours, theirs in zip(state, whole, strict=True):
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert not list(store.folder.glob("*.partial"))
