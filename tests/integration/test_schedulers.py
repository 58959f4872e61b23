"""Ranks that something else than DeepSpeed's launcher starts: torchrun, and srun by the variables that it sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import ROOT
from tests.integration.commands import read_metrics, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TORCHRUN = Path(sys.executable).with_name("torchrun")


def _losses(run: Path) -> list[float]:
    return [m["loss"] for m in read_metrics(run) if "loss" in m]


def test_torchrun_and_srun_give_the_same_run(corpus: Path, tmp_path: Path) -> None:
    by_torchrun, by_srun = tmp_path / "torchrun", tmp_path / "srun"
    recipe = write_recipe(corpus, by_torchrun)
    command: list[str | Path] = [TORCHRUN, "--nproc-per-node", "2", "infoxlm_ds/train.py", recipe]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

    tasks = []
    for number in range(2):
        job = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NODELIST": "localhost",
        }
        task: list[str | Path] = [sys.executable, "infoxlm_ds/train.py", recipe, f"run={by_srun}"]
        tasks.append(subprocess.Popen(task, cwd=ROOT, env=os.environ | job, stderr=subprocess.PIPE, text=True))
    for task_process in tasks:
        _, stderr = task_process.communicate(timeout=120)
        assert task_process.returncode == 0, stderr
    assert _losses(by_srun) == _losses(by_torchrun) and len(_losses(by_srun)) == 6
