"""The program behind `make gpu` runs whole on a CPU, with small sizes, and so do the tests marked gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "Tests marked gpu",
    "Text",
    "base: a step",
    "base: where the time of a step goes",
    "base: what makes the host wait for the GPU",
    "base: the GPU's longest kernels",
    "large: a step",
    "Peers: the same items on one GPU",
    "The contrast alone",
)


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, "-m", *command]
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_section_of_the_report_is_written(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    ended = _run("benchmarks.gpu", "--device", "cpu", "--tiny", "--corpus", corpus, "--report", path)
    report = path.read_text(encoding="utf-8")
    assert ended.returncode == 0, f"{report}\n{ended.stderr}"
    assert report.rstrip().endswith("Nothing failed.") and "FAILED" not in report and report in ended.stdout
    titles = [line.removeprefix("## ") for line in report.splitlines() if line.startswith("## ")]
    assert len(titles) == len(SECTIONS) + 1
    for title, section in zip(titles, SECTIONS, strict=False):
        assert title.startswith(section)


def test_a_section_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    """Without a corpus, `base` fails; the contrast needs none."""
    path = tmp_path / "report.md"
    parts = ("--only", "base", "--only", "contrast")
    ended = _run("benchmarks.gpu", "--device", "cpu", "--tiny", "--corpus", tmp_path, "--report", path, *parts)
    report = path.read_text(encoding="utf-8")
    assert ended.returncode == 1 and "**FAILED**" in report and "is no prepared corpus" in report
    assert "operations a second" in report and report.rstrip().endswith("Failed: base")


def test_without_a_gpu_it_says_so() -> None:
    ended = _run("benchmarks.gpu")
    assert ended.returncode == 2 and "no GPU" in ended.stderr


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_on_a_cpu() -> None:
    """Everything in them but the kernels."""
    ended = _run("pytest", "-q", "-m", "gpu", "--device", "cpu", *sorted(ROOT.glob("tests/*/*_gpu.py")))
    assert ended.returncode == 0, ended.stdout
    assert "skipped" not in ended.stdout.splitlines()[-1]
