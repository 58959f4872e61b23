"""What goes wrong in a run, through the real launcher: nothing hangs, nothing is lost, and the cause is told."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.checkpoint.store import Store, damage_of
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.trainer import fit
from tests.corpus import ROOT, small_recipe
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import stop_after_two
from tests.integration.commands import (
    INFOXLM,
    infoxlm,
    infoxlm_here,
    read_metrics,
    train_here,
    wait_for_steps,
    write_recipe,
)
from tests.trouble import leads_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LONG = {"learning_rate": 1e-2, "steps": 5000, "warmup": 2}


def _start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [INFOXLM, "train", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _ranks(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """In rank order."""
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # one that ends just now
            if "RANK" in (variables := child.environ()) and not child.children():
                ranks[int(variables["RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def _told(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("infoxlm: ")]
    return line


def test_a_rank_that_is_killed_alone_is_named_by_the_others(corpus: Path, tmp_path: Path) -> None:
    """Rank 0, which writes for all. On two hosts, rank 1 is killed."""
    run = tmp_path / "run"
    process = _start(write_recipe(corpus, run, optimizer=LONG))
    wait_for_steps(process, run, 5)
    rank = _ranks(process)[0]
    rank.kill()
    _, stderr = process.communicate(timeout=60)
    newest = Store(run).latest()
    assert process.returncode == 1 and newest is not None and damage_of(newest) == ""
    line = _told(stderr)
    assert f"rank 0 (process {rank.pid} on " in line and "is gone without a message" in line
    assert newest.name in line and "Traceback" not in stderr and leads_to("Out of memory") in line


def test_ranks_that_all_die_at_once_are_told_by_who_started_them(corpus: Path, tmp_path: Path) -> None:
    """As when NCCL's watchdog ends each of them."""
    run = tmp_path / "run"
    process = _start(write_recipe(corpus, run, optimizer=LONG))
    wait_for_steps(process, run, 5)
    ranks = _ranks(process)
    for rank in ranks:
        rank.suspend()  # so that none has time to see that another is gone
    for rank in ranks:
        rank.send_signal(signal.SIGABRT)
    for rank in ranks:
        rank.resume()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    line = _told(stderr)
    assert "the ranks died without a message (SIGABRT)" in line and "run the same command again" in line


def test_a_rank_that_does_not_answer_is_named_when_the_time_is_up(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(write_recipe(corpus, run, optimizer=LONG, timeout={"start": 60, "step": 5}))
    wait_for_steps(process, run, 5)
    silent = _ranks(process)[1]
    silent.suspend()
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("infoxlm: "))
    silent.kill()  # the launcher itself would leave it 30 seconds
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 (process " in line and "does not answer" in line and "timeout.step" in line
    assert leads_to("It hangs, or a rank is lost") in line


def test_a_rank_that_fails_alone_is_quoted_by_the_others(corpus: Path, tmp_path: Path) -> None:
    """It cannot write what only it writes: the metrics."""
    run = tmp_path / "run"
    (run / "metrics.jsonl").mkdir(parents=True)
    done = infoxlm("train", write_recipe(corpus, run, optimizer=LONG), timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("infoxlm: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert any(line.startswith("infoxlm: rank 0: IsADirectoryError: [Errno 21]") for line in lines), done.stderr
    assert any("rank 0 failed: IsADirectoryError: [Errno 21]" in line for line in lines), done.stderr


def test_a_full_disk_leaves_the_old_checkpoint_and_is_said(
    corpus: Path, tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saving = {"every": 2}
    recipe = write_recipe(corpus, small_disk, checkpoint=saving, log={"every": 1, "tensorboard": False})
    capfd.readouterr()
    assert run_ranks(train_here, 2, recipe) == [1, 1]
    newest, screen = Store(small_disk).latest(), capfd.readouterr()
    assert newest is not None and newest.name == "step-00000002" and damage_of(newest) == "", screen.out
    assert "Traceback" not in screen.err
    said = [line for line in screen.out.splitlines() if "could not be written" in line]
    assert all(leads_to("The disk is full") in line for line in [*said, _told(screen.err)])
    assert len(said) == 2 and all("No space left on device" in line and newest.name in line for line in said), said
    assert "the last checkpoint could not be written" in _told(screen.err)
    assert not list(newest.parent.glob("*.partial"))

    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert run_ranks(train_here, 2, recipe) == [0, 0]
    assert [m["step"] for m in read_metrics(small_disk) if "loss" in m] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("imported", [False, True])
def test_a_run_that_is_stopped_before_its_first_step_exits_as_one_to_run_again(
    corpus: Path, tmp_path: Path, imported: bool
) -> None:
    """While ranks import their libraries, or when they build the model."""
    run = tmp_path / "run"
    process = _start(write_recipe(corpus, run, optimizer=LONG))
    deadline = time.monotonic() + 120
    while not ((run / "checkpoints" / "lock").exists() if imported else _ranks(process)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in stderr


def test_sigterm_to_the_launcher_saves_within_its_grace(corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed's launcher leaves ranks 30 seconds, and has an exit code of its own."""
    run = tmp_path / "run"
    recipe = write_recipe(corpus, run, optimizer=LONG, checkpoint={"every": 5000, "asynchronous": True})
    deepspeed = Path(sys.executable).with_name("deepspeed")
    process = subprocess.Popen(
        [deepspeed, "--num_accelerators", "2", "infoxlm_ds/train.py", recipe],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_steps(process, run, 5)
    launchers = [c for c in psutil.Process(process.pid).children(recursive=True) if c.children()]
    launchers[-1].send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    newest = Store(run).latest()
    assert newest is not None and damage_of(newest) == "", output
    assert f"stopped on request at step {int(newest.name[-8:])}" in output


def _train(rank: int, world: int, recipe: Recipe) -> None:
    start_ranks()
    state = build(agreed_inputs(recipe))
    fit(state, None)
    state.loader.close()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_who_is_asked_may_agree_to_go_on_from_the_checkpoint_before(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(corpus, run)
    run_ranks(stop_after_two, 2, small_recipe(corpus, run))
    newest, older = reversed(Store(run).steps()[-2:])
    _flip(newest / "queue-00000.safetensors")
    ours, theirs = pty.openpty()
    command: list[str | Path] = [INFOXLM, "train", recipe]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.write(ours, b"y\n")
    output, _ = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0 and f"Go on from {older.name}" in output and f"going on from {older.name}" in output
    assert newest.with_name(newest.name + ".damaged").is_dir()


def test_the_checkpoint_commands(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(_train, 2, small_recipe(corpus, run, "optimizer.steps=5", "checkpoint.every=1", "checkpoint.keep=4"))
    listed = infoxlm_here("checkpoint", "list", run)
    assert listed.returncode == 0 and "newest" in listed.stdout and "fp32" in listed.stdout
    verified = infoxlm_here("checkpoint", "verify", run)
    assert verified.returncode == 0 and verified.stdout.count("whole") == 4

    assert infoxlm_here("checkpoint", "consolidate", run, tmp_path / "weights", "--step", "4").returncode == 0
    assert {p.name for p in (tmp_path / "weights").iterdir()} == {
        "model.safetensors",
        "key_encoder.safetensors",
        "state.json",
    }
    assert json.loads((tmp_path / "weights" / "state.json").read_text())["step"] == 4

    _flip(run / "checkpoints" / "step-00000003" / "queue-00000.safetensors")
    verified = infoxlm_here("checkpoint", "verify", run)
    assert verified.returncode == 1 and "step-00000003: queue-00000.safetensors differs" in verified.stdout
    refused = infoxlm_here("checkpoint", "consolidate", run, tmp_path / "other", "--step", "3")
    assert refused.returncode == 2 and "queue-00000.safetensors differs" in refused.stderr

    assert "step-00000002" in infoxlm_here("checkpoint", "prune", run, "--keep", "2", "--dry-run").stdout
    assert len(Store(run).steps()) == 4
    assert infoxlm_here("checkpoint", "prune", run, "--keep", "1", "--keep-every", "2").returncode == 0
    assert [p.name[-1] for p in Store(run).steps()] == ["2", "4", "5"]
    for words in (["list"], ["verify"], ["prune"]):
        nowhere = infoxlm_here("checkpoint", *words, tmp_path / "nowhere")
        assert nowhere.returncode == 2 and "holds no checkpoint" in nowhere.stderr
