"""`infoxlm watch` shows what a run has written, as it is written."""

from __future__ import annotations

import json
import lzma
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from infoxlm_ds.config import UserError
from infoxlm_ds.monitor import watch as module
from infoxlm_ds.monitor.history import Row, read_rows
from infoxlm_ds.monitor.starts import STARTS, record_start
from infoxlm_ds.monitor.watch import Watched, watch
from tests.monitor.test_watchdogs import DEMO

LINES = lzma.decompress(DEMO.read_bytes()).decode().splitlines(keepends=True)
ENDED = json.dumps({"step": 700, "ended": "finished"}) + "\n"


def _shown(watched: Watched) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(watched.table())
    return captured.get()


def _append(run: Path, *lines: str) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(lines)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record_start(tmp_path, {"step": 0, "ranks": 2, "steps": 700})
    _append(tmp_path, *LINES[:60])
    return tmp_path


def test_the_newest_figures_are_shown(run: Path) -> None:
    warning = json.dumps({"step": 500, "warning": "data_wait", "text": "training waits for data"}) + "\n"
    _append(run, warning, '{"step": 510, "los')
    text = _shown(Watched(run))
    for part in ("step", "500 of 700", "xlco 0.357, acc 0.906", "0.770, best 0.770", "step 500: training waits"):
        assert part in text, text
    assert "checkpoint   step 500" in text and "old" in text and "stalled" not in text


def test_lines_are_read_as_they_come_and_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(run)
    half = len(LINES[60]) // 2
    _append(run, LINES[60][:half])
    watched.look()
    assert "500 of 700" in _shown(watched)
    read: list[str] = []

    def counted(lines: list[str]) -> list[Row]:
        read.extend(lines)
        return list(read_rows(lines))

    monkeypatch.setattr(module, "read_rows", counted)
    _append(run, LINES[60][half:], *LINES[61:], ENDED)
    watched.look()
    assert len(read) == len(LINES) - 60 + 1
    assert watched.over and "finished" in _shown(watched)


def test_a_run_that_starts_again_without_its_last_lines_is_followed(run: Path) -> None:
    _append(run, ENDED)
    watched = Watched(run)
    assert watched.over
    newer = run / "metrics.jsonl.new"
    newer.write_text("".join(LINES[:10]), encoding="utf-8")
    newer.replace(run / "metrics.jsonl")
    watched.look()
    assert not watched.over and "100 of 700" in _shown(watched)
    _append(run, ENDED)
    future = time.time() + 5
    os.utime(run / STARTS, (future, future))  # a start has come, and no line yet
    watched.look()
    assert not watched.over


def test_a_run_that_is_late_and_one_that_failed_are_told(run: Path) -> None:
    past = time.time() - 3600
    os.utime(run / "metrics.jsonl", (past, past))
    watched = Watched(run)
    assert "1:00:00 old; stalled?" in _shown(watched) and not watched.over
    (run / "failures").mkdir()
    failure = {"rank": 1, "cause": "OSError: No space left on device", "code": 1}
    (run / "failures" / "rank-00001.json").write_text(json.dumps(failure), encoding="utf-8")
    watched.look()
    assert watched.over and "failed: rank 1: OSError" in _shown(watched)


def test_without_a_terminal_it_is_shown_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(run, Console())
    assert "500 of 700" in capsys.readouterr().out


def test_on_a_terminal_it_ends_with_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: _append(run, ENDED))
    console = Console(force_terminal=True, width=100)
    with console.capture() as captured:
        watch(run, console)
    assert "finished" in captured.get()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        Watched(tmp_path)
