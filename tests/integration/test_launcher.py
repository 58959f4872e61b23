"""The commands of the README through the real launcher: train, stop, go on, export, evaluate; and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infoxlm_ds.checkpoint.store import Store, damage_of
from tests.corpus import EMBEDDED, ROOT
from tests.distributed.ranks import run_ranks
from tests.integration.commands import (
    INFOXLM,
    infoxlm,
    infoxlm_here,
    read_losses,
    read_metrics,
    train_here,
    wait_for_steps,
    write_recipe,
)
from tests.trouble import leads_to

DEEPSPEED = Path(sys.executable).with_name("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


LONG = {"learning_rate": 1e-2, "steps": 40, "warmup": 2}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, float]:
    """The losses of a run that nothing disturbed, by the README's plain command, in an environment that is a user's."""
    run = tmp_path_factory.mktemp("whole") / "run"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command: list[str | Path] = [DEEPSPEED, "--num_accelerators", "2", "infoxlm_ds/train.py"]
    command.append(write_recipe(corpus, run, optimizer=LONG))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_losses(run)


def test_the_plain_launcher_command_trains(whole: dict[float, float]) -> None:
    assert list(whole) == list(range(1, 41)) and whole[40] < whole[1]


def test_train_stop_resume_export_evaluate(corpus: Path, tmp_path: Path, whole: dict[float, float]) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(corpus, run, optimizer=LONG)
    process = subprocess.Popen(
        [INFOXLM, "train", recipe], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(process, run, 4)
    pruning = infoxlm_here("checkpoint", "prune", run)
    assert pruning.returncode == 2 and "trains in" in pruning.stderr
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    stopped_at = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 3 < stopped_at < 40

    assert run_ranks(train_here, 2, recipe) == [0, 0]
    assert read_losses(run) == whole  # bit-equal: the figures are written in full
    probes = [m for m in read_metrics(run) if "probe/mean" in m]
    assert probes and all({"probe/de", "probe/ru", "probe/trigram_mean"} <= m.keys() for m in probes)
    assert list((run / "tensorboard" / run.name).glob("events*"))
    finished = infoxlm_here("train", recipe)
    assert finished.returncode == 0 and "nothing to do" in finished.stdout

    assert infoxlm_here("export", run, tmp_path / "model").returncode == 0
    data = EMBEDDED / "home_assistant.dev.jsonl.xz"
    result = infoxlm_here(
        *(
            "eval",
            "retrieval",
            "--model",
            tmp_path / "model",
            "--data",
            data,
            "--languages",
            "de,ru",
            "--json",
            tmp_path / "r.json",
        )
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["languages"]
    assert [row["lang"] for row in rows] == ["de", "ru"] and all(row["layer"] == 1 for row in rows)
    compared = infoxlm_here("eval", "compare", tmp_path / "r.json")
    assert compared.returncode == 0 and "home_assistant.dev" in compared.stdout


def _started(corpus: Path, run: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run of 4,000 steps that has made some, and its ranks."""
    recipe = write_recipe(corpus, run, optimizer=LONG | {"steps": 4000})
    process = subprocess.Popen(
        [INFOXLM, "train", recipe], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(process, run, 4)
    children = psutil.Process(process.pid).children(recursive=True)
    return process, [child for child in children if "train.py" in " ".join(child.cmdline()) and not child.children()]


def test_ranks_end_with_the_command_that_started_them(corpus: Path, tmp_path: Path) -> None:
    process, ranks = _started(corpus, tmp_path / "run")
    process.kill()
    assert len(ranks) == 2
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    newest = Store(tmp_path / "run").at()  # they had saved
    assert int(newest.name.removeprefix("step-")) >= 4 and damage_of(newest) == ""


def test_ctrl_c_is_answered_and_a_second_one_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    process, ranks = _started(corpus, tmp_path / "run")
    for rank in ranks:
        rank.suspend()  # they cannot save
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert output.startswith("reading ") and "starting 2 ranks ..." in output and "saving, then stopping" in output
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    for checkpoint in Store(tmp_path / "run").steps():
        assert damage_of(checkpoint) == ""


def test_a_run_that_diverges_ends_with_one_line_and_code_1(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = {"learning_rate": 1e30, "clip": 0.0, "steps": 40, "warmup": 1, "most_skipped": 3}
    recipe = write_recipe(corpus, tmp_path / "run", optimizer=wild, checkpoint={"every": 1})
    capfd.readouterr()
    assert run_ranks(train_here, 2, recipe) == [1, 1]
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("infoxlm: ")]
    good = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert "3 steps in a row" in line and good in line and "Traceback" not in said.err
    assert said.out.count("was not applied") == 3 and said.out.count(leads_to("Steps are not applied")) == 3


def _damaged(corpus: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(corpus, copy)
    next(copy.glob("nway*/*.tar")).unlink()
    return copy


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.stepz=3"], ["optimizer.stepz", "not a known key"]),
        (["batch.lanes=3"], ["batch.lanes", "3", leads_to("The run does not start or go on")]),
        (["batch.xlco_pairs=100000"], ["100000"]),
        (["model.positions=20"], ["positions"]),
        (["model.init={other}"], ["tokenizer", leads_to("The tokenizer does not fit")]),
        (["corpus={damaged}"], [".tar"]),
        (["corpus=nowhere"], ["nowhere"]),
        (["engine=nowhere.json"], ["nowhere.json"]),
        (["probe.data=nowhere.jsonl"], ["nowhere.jsonl"]),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(
    corpus: Path, model_folder: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    recipe = write_recipe(corpus, tmp_path / "run")
    places = {"other": model_folder, "damaged": _damaged(corpus, tmp_path) if "{damaged}" in overrides[0] else ""}
    changes = [o.format(**places) for o in overrides]
    if overrides == ["batch.lanes=3"]:  # `infoxlm train` would start as many ranks as divide the lanes
        command: list[str | Path] = [DEEPSPEED, "--num_accelerators", "2", "infoxlm_ds/train.py", recipe, *changes]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        lines = [line for line in done.stderr.splitlines() if line.startswith("infoxlm: ")]
    else:
        done = (infoxlm if overrides == ["corpus=nowhere"] else infoxlm_here)("train", recipe, *changes)
        lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("infoxlm: "), done.stderr
    assert all(word in lines[0] for word in words), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_damaged_pack_met_in_mid_run_is_told_by_the_rank_that_reads_it(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    for shard in copy.glob("*/*.tar"):  # the sizes stay right: nothing is seen before the pack is read
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
    recipe = write_recipe(copy, tmp_path / "run")
    capfd.readouterr()
    assert run_ranks(train_here, 2, recipe) == [2, 2]
    said = capfd.readouterr().err
    assert "infoxlm: " in said and "damaged" in said


def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_equal(
    corpus: Path, tmp_path: Path, whole: dict[float, float]
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(corpus, run, optimizer=LONG)
    process = subprocess.Popen(
        [INFOXLM, "train", recipe], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_steps(process, run, 9)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.wait(timeout=60)
    assert 6 <= int((run / "checkpoints" / "latest").read_text().removeprefix("step-")) < 40
    assert run_ranks(train_here, 2, recipe) == [0, 0]
    assert read_losses(run) == whole
    steps = [m["step"] for m in read_metrics(run) if "loss" in m]
    assert steps == sorted(set(steps))  # what was written beyond the checkpoint was taken out
