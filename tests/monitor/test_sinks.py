"""metrics.jsonl survives kills, damage and a full disk, and training goes on."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from infoxlm_ds.config import Log
from infoxlm_ds.monitor.sinks import Sinks


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(run: Path, first: int, *steps: int) -> None:
    with Sinks(run, first, 10, Log(tensorboard=False)) as sinks:
        for step in steps:
            sinks.write(step, {"loss": step / 2})


def test_lines_of_later_steps_and_half_a_line_are_removed(tmp_path: Path) -> None:
    _write(tmp_path, 0, 1, 2, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    _write(tmp_path, 2, 3)
    assert [row["step"] for row in _rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert not list(tmp_path.glob("*.damaged*"))


def test_no_flipped_bit_stops_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, 0, 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        _write(tmp_path, 3, 4)
        assert _rows(path)[-1]["step"] == 4
        for kept in tmp_path.glob("*.damaged-*"):
            assert kept.read_bytes() == damaged
            assert "cannot be read" in capsys.readouterr().out
            kept.unlink()


def test_a_folder_that_is_removed_in_mid_run_is_begun_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with Sinks(run, 0, 10, Log()) as sinks:
        sinks.write(1, {"loss": 0.5})
        while run.exists():  # TensorBoard's thread may write meanwhile
            shutil.rmtree(run, ignore_errors=True)
        sinks.write(2, {"loss": 0.5})
    assert [row["step"] for row in _rows(run / "metrics.jsonl")] == [2]
    said = capfd.readouterr()
    assert "TensorBoard cannot be written: No such file" in said.out and "Traceback" not in said.err


def test_a_full_disk_is_said_once_and_its_end_too(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ballast = small_disk / "ballast"
    with Sinks(small_disk, 0, 10, Log()) as sinks:
        sinks.write(1, {"loss": 0.5})
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        more = {"text": "x" * 10_000}
        for step in (2, 3):
            sinks.write(step, {"loss": 0.5}, more)
        assert capsys.readouterr().out.count("cannot be written: No space left on device") == 1
        ballast.unlink()
        sinks.write(4, {"loss": 0.5}, more)
        assert "is written again; 2 lines are missing" in capsys.readouterr().out
    assert [row["step"] for row in _rows(small_disk / "metrics.jsonl")] == [1, 4]
