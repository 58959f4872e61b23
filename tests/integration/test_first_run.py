"""What a newcomer calls: `infoxlm init` for two files of their own, and `infoxlm demo`, which goes on after a kill."""

from __future__ import annotations

import json
import lzma
import signal
import subprocess
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.corpus import EMBEDDED, ROOT
from tests.distributed.ranks import run_ranks
from tests.integration.commands import INFOXLM, infoxlm, infoxlm_here, read_losses, train_here, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = ("optimizer.steps=20", "optimizer.warmup=1", "checkpoint.every=2", "log.every=1", "probe=null")


def test_two_files_of_a_user_become_a_model_in_sentence_transformers(tmp_path: Path) -> None:
    """Every command that the documentation names, on the way from two files to vectors; training is stopped by ^C on
    two ranks and goes on with one."""
    with lzma.open(EMBEDDED / "home_assistant.train.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = (json.loads(line)["text"] for line in lines)
        pairs = list(islice((row for row in rows if "de" in row), 400))
    for code in ("en", "de"):
        text = "".join(" ".join(row[code].split()) + "\n" for row in pairs)
        (tmp_path / code).write_text(text, encoding="utf-8")
    mine, run, model = tmp_path / "mine", tmp_path / "mine" / "run", tmp_path / "model"
    done = infoxlm_here("init", mine, tmp_path / "en", tmp_path / "de", "--languages", "en,de")
    assert done.returncode == 0, done.stderr
    build, *_ = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  infoxlm"))
    assert infoxlm_here(*build).returncode == 0

    train = (str(mine / "recipe.yaml"), "optimizer.steps=60", "optimizer.warmup=1", "log.every=1", f"run={run}")
    looked = infoxlm_here("train", *train, "--dry-run")
    assert looked.returncode == 0 and "nothing was started or written" in looked.stdout and not run.exists()
    process = subprocess.Popen(
        [INFOXLM, "train", *train], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(process, run, 2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "run the same command again to go on" in said
    stopped = max(read_losses(run))
    assert stopped < 60 and "stopped" in infoxlm_here("watch", run, "--once").stdout
    assert run_ranks(train_here, 1, *train) == [0]
    assert list(read_losses(run)) == list(range(1, 61))

    assert list((run / "tensorboard" / run.name).glob("events*"))
    assert infoxlm_here("report", run, tmp_path / "report.html").returncode == 0
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert infoxlm_here("export", run, model).returncode == 0
    table = infoxlm_here("eval", "retrieval", "--model", model, "--data", mine / "dev.jsonl", "--min-pairs", "2")
    assert table.returncode == 0 and "de" in table.stdout, table.stderr
    embedded = infoxlm_here("embed", model, tmp_path / "de", "--out", tmp_path / "vectors.npy")
    assert embedded.returncode == 0, embedded.stderr
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = (tmp_path / "de").read_text(encoding="utf-8").splitlines()
    vectors = sentence_transformers.SentenceTransformer(str(model), device="cpu").encode(texts)
    np.testing.assert_allclose(vectors, np.load(tmp_path / "vectors.npy"), atol=1e-5)


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
