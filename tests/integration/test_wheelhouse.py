"""An installation where no network is, from the wheels that `make wheelhouse` gathered."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from tests.corpus import ROOT

pytestmark = [pytest.mark.release, pytest.mark.timeout(600)]


def _run(*command: str | Path, **environment: str) -> str:
    run = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_gathered_wheels_alone_make_an_environment(tmp_path: Path) -> None:
    """Beside torch, which such hosts bring, and which is lent to the new environment here."""
    wheels = tmp_path / "wheels"
    version = "{}.{}".format(*sys.version_info)
    _run("make", "wheelhouse", f"PYTHON={version}", f"WHEELHOUSE={wheels}")
    new = tmp_path / "venv"
    venv.create(new, with_pip=True)
    python = new / "bin" / "python"
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:1"}
    install = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--find-links", wheels)
    _run(*install, "-r", wheels / "requirements.txt", **offline)
    (packages,) = (new / "lib").glob("python*/site-packages")
    lender = Path(torch.__file__).parent.parent
    for path in [*lender.glob("torch*"), *lender.glob("functorch*")]:
        if not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    _run(*install, "--no-build-isolation", "-e", ".", **offline)
    said = _run(new / "bin" / "infoxlm", "doctor")
    assert "failure" not in said and "packages" in said
