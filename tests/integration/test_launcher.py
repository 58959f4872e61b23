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

import pytest
import yaml

from tests.corpus import EMBEDDED, ROOT, small_recipe

INFOXLM = Path(sys.executable).with_name("infoxlm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _run(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INFOXLM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def _recipe(corpus: Path, run: Path, **changes: object) -> Path:
    """The small recipe as a file, with a probe."""
    tree = small_recipe(corpus, run).model_dump(mode="json", exclude_none=True)
    tree["probe"] = {
        "data": str(EMBEDDED / "home_assistant.dev.jsonl.xz"),
        "languages": ["de", "ru"],
        "pairs": 50,
        "every": 3,
    }
    path = run.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | changes), encoding="utf-8")
    return path


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_train_stop_resume_export_evaluate(corpus: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    recipe = _recipe(corpus, run, optimizer={"learning_rate": 1e-2, "steps": 40, "warmup": 2})
    assert _run("train", recipe, f"run={whole}").returncode == 0

    process = subprocess.Popen(
        [INFOXLM, "train", recipe], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").is_file() and len(_metrics(run)) >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    stopped_at = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 3 < stopped_at < 40

    again = _run("train", recipe)
    assert again.returncode == 0, again.stderr
    losses, expected = ({m["step"]: m["loss"] for m in _metrics(folder) if "loss" in m} for folder in (run, whole))
    assert losses == expected  # bit-equal: the figures are written in full
    probes = [m for m in _metrics(run) if "probe/mean" in m]
    assert probes and all({"probe/de", "probe/ru", "probe/trigram_mean"} <= m.keys() for m in probes)
    assert list((run / "tensorboard").glob("events*"))
    finished = _run("train", recipe)
    assert finished.returncode == 0 and "nothing to do" in finished.stdout

    assert _run("export", run, tmp_path / "model").returncode == 0
    data = EMBEDDED / "home_assistant.dev.jsonl.xz"
    result = _run(
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
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["lang"] for row in rows] == ["de", "ru"] and all(row["layer"] == 1 for row in rows)
    compared = _run("eval", "compare", tmp_path / "r.json")
    assert compared.returncode == 0 and "home_assistant.dev" in compared.stdout


def test_the_plain_launcher_command_trains(corpus: Path, tmp_path: Path) -> None:
    recipe = _recipe(corpus, tmp_path / "run", optimizer={"learning_rate": 1e-2, "steps": 2, "warmup": 1})
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command: list[str | Path] = [deepspeed, "--num_accelerators", "2", "infoxlm_ds/train.py", recipe]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000002"


def _damaged(corpus: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(corpus, copy)
    next(copy.glob("nway*/*.tar")).unlink()
    return copy


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.stepz=3"], ["optimizer.stepz", "not a known key"]),
        (["batch.lanes=3"], ["batch.lanes", "3"]),
        (["batch.xlco_pairs=100000"], ["100000"]),
        (["model.positions=20"], ["positions"]),
        (["model.init={other}"], ["tokenizer"]),
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
    recipe = _recipe(corpus, tmp_path / "run")
    places = {"other": model_folder, "damaged": _damaged(corpus, tmp_path) if "{damaged}" in overrides[0] else ""}
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "infoxlm_ds.train",
        recipe,
        *(o.format(**places) for o in overrides),
    ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    if overrides == ["batch.lanes=3"]:
        command = [
            Path(sys.executable).with_name("deepspeed"),
            "--num_accelerators",
            "2",
            "infoxlm_ds/train.py",
            *command[3:],
        ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("infoxlm: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
    assert not (tmp_path / "run").exists()
