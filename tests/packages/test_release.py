"""The packages as a release publishes them: built, checked, installed into an empty environment, and tried there."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.corpus import ROOT

pytestmark = [pytest.mark.release, pytest.mark.timeout(3600)]
# What would lead the new environment to this clone, or to what is installed here.
OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")

ENCODE = """
import sys, numpy, sentence_transformers
model, text, out = sys.argv[1:]
lines = open(text, encoding="utf-8").read().splitlines()
numpy.save(out, sentence_transformers.SentenceTransformer(model).encode(lines))
"""


def _run(folder: Path, *command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def _environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin"


def test_a_stranger_gets_a_model_its_report_and_its_vectors_from_the_wheel_alone(tmp_path: Path) -> None:
    tools = _environment(tmp_path / "tools")
    _run(tmp_path, tools / "python", "-m", "pip", "install", "--quiet", "build>=1.6", "twine>=7.0")
    copy = tmp_path / "copy"  # setuptools would take what an older build left in the clone
    _run(ROOT, "git", "clone", "--quiet", ROOT, copy)
    _run(copy, tools / "python", "-m", "build", "--outdir", tmp_path / "dist")
    packages = sorted((tmp_path / "dist").iterdir())
    assert [path.name.removeprefix("infoxlm_ds-0.1.0") for path in packages] == ["-py3-none-any.whl", ".tar.gz"]
    _run(tmp_path, tools / "python", "-m", "twine", "check", "--strict", *packages)

    new = _environment(tmp_path / "new")
    install = (new / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "requirements.lock")
    _run(tmp_path, *install, packages[0])
    where = _run(tmp_path, new / "python", "-c", "import infoxlm_ds; print(infoxlm_ds.__file__)")
    assert where.startswith(str(tmp_path / "new"))
    steps = ("optimizer.steps=10", "optimizer.warmup=2", "checkpoint.every=5")
    said = _run(tmp_path, new / "infoxlm", "demo", "demo", *steps)
    assert "step 10/10" in said
    run = tmp_path / "demo"
    table, exported = run / "retrieval.json", run / "export" / "model.safetensors"
    assert len({row["data"] for row in json.loads(table.read_text())["languages"]}) == 4
    written = [path.stat().st_mtime_ns for path in (table, exported)]
    assert "nothing to do" in _run(tmp_path, new / "infoxlm", "demo", "demo", *steps)
    assert [path.stat().st_mtime_ns for path in (table, exported)] == written

    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "checkpoint" in page
    (tmp_path / "text").write_text("Open the door.\nÖffne die Tür.\n", encoding="utf-8")
    _run(tmp_path, new / "infoxlm", "embed", run / "export", "text", "--out", "ours.npy")
    _run(tmp_path, *install, "sentence-transformers>=6.2")
    _run(tmp_path, new / "python", "-c", ENCODE, run / "export", "text", "theirs.npy")
    ours, theirs = np.load(tmp_path / "ours.npy"), np.load(tmp_path / "theirs.npy")
    assert ours.shape == (2, 256)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
