"""The command line as a user calls it, and what a test needs around it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from infoxlm_ds import cli
from infoxlm_ds.train import main
from tests.corpus import EMBEDDED, ROOT, small_recipe

INFOXLM = Path(sys.executable).with_name("infoxlm")


def infoxlm(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INFOXLM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def infoxlm_here(*arguments: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The same in this process, without the imports of another: for what does not start ranks."""
    out, err, code = io.StringIO(), io.StringIO(), None
    words = ["infoxlm", *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err), chdir(folder):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def train_here(rank: int, world: int, *arguments: str | Path) -> int:
    """What the launcher runs, for `run_ranks`."""
    return main([*map(str, arguments)])


def write_recipe(corpus: Path, run: Path, **changes: object) -> Path:
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


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_losses(run: Path) -> dict[float, float]:
    """By step."""
    return {m["step"]: m["loss"] for m in read_metrics(run) if "loss" in m}


def wait_for_steps(process: subprocess.Popen[Any], run: Path, steps: int) -> None:
    """Until the run has logged so many steps."""
    deadline = time.monotonic() + 120
    while _logged(run / "metrics.jsonl") < steps:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def _logged(metrics: Path) -> int:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n") and '"loss"' in line), default=0)
