"""What a newcomer calls: `infoxlm init` for two files of their own, and `infoxlm demo`, which goes on after a kill."""

from __future__ import annotations

import json
import lzma
import subprocess
import time
from itertools import islice
from pathlib import Path

import pytest

from tests.corpus import EMBEDDED, ROOT
from tests.distributed.ranks import run_ranks
from tests.integration.commands import INFOXLM, infoxlm, infoxlm_here, read_losses, train_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = ("optimizer.steps=20", "optimizer.warmup=1", "checkpoint.every=2", "log.every=1", "probe=null")


def test_two_files_of_a_user_become_a_model_that_is_measured(tmp_path: Path) -> None:
    with lzma.open(EMBEDDED / "home_assistant.train.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = (json.loads(line)["text"] for line in lines)
        pairs = list(islice((row for row in rows if "de" in row), 400))
    for code in ("en", "de"):
        text = "".join(" ".join(row[code].split()) + "\n" for row in pairs)
        (tmp_path / code).write_text(text, encoding="utf-8")
    mine = tmp_path / "mine"
    done = infoxlm_here("init", mine, tmp_path / "en", tmp_path / "de", "--languages", "en,de")
    assert done.returncode == 0, done.stderr
    build, _, export, measure = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  infoxlm"))
    assert infoxlm_here(*build).returncode == 0
    assert run_ranks(train_here, 2, mine / "recipe.yaml", "optimizer.steps=5", "optimizer.warmup=1") == [0, 0]
    assert infoxlm_here(*export).returncode == 0
    table = infoxlm_here(*measure)
    assert table.returncode == 0 and "20" in table.stdout and "de" in table.stdout, table.stderr


def test_the_demo_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed while it prepares the corpus, and while it trains."""
    demo = tmp_path / "demo"
    command = ("demo", str(demo), *STEPS)
    for reached in (demo / "corpus.work", demo / "checkpoints" / "latest"):
        process = subprocess.Popen(
            [INFOXLM, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 300
        while not reached.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.communicate()
    done = infoxlm(*command, timeout=600)
    assert done.returncode == 0, done.stderr
    assert list(read_losses(demo)) == list(range(1, 21))
    for name in ("export/model.safetensors", "retrieval.json", "tensorboard", "metrics.jsonl", "checkpoints/latest"):
        assert (demo / name).exists(), name
        assert name.split("/")[0] in done.stdout or name.startswith("checkpoints")
