"""The messages of a rank that ends early."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infoxlm_ds import dist
from infoxlm_ds.config import UserError
from infoxlm_ds.monitor import failures


class Gone(RuntimeError):
    def __init__(self) -> None:
        super().__init__("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "WAIT", 0.0)


WHERE = [failures.Place("a", 1), failures.Place("b", 2), failures.Place("c", 3)]


@pytest.mark.parametrize(
    ("cause", "code", "words"),
    [
        (UserError("p.tar is damaged"), 2, "p.tar is damaged"),
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
    ],
)
def test_a_cause_is_told_by_its_rank_and_by_those_it_took_along(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cause: Exception,
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr(dist, "rank", lambda group=None: 1)
    assert failures.end(cause, tmp_path, WHERE, "Newest: 7") == code
    assert f"infoxlm: rank 1: {words}" in capsys.readouterr().err
    monkeypatch.setattr(dist, "rank", lambda group=None: 0)
    assert failures.end(Gone(), tmp_path, WHERE, "Newest: 7") == code
    line = capsys.readouterr().err
    assert f"rank 1 failed: {words}" in line and "Newest: 7" in line
    assert "rank 2 (process 3 on c) is gone without a message" in line
    monkeypatch.setattr(dist, "rank", lambda group=None: 2)
    assert failures.end(Gone(), tmp_path, WHERE, "Newest: 7") == code
    assert capsys.readouterr().err == ""  # rank 0 has reported it
    failures.forget(tmp_path)
    assert failures.end(Gone(), tmp_path, WHERE, "") == 1
    assert "rank 1 failed" not in capsys.readouterr().err


def test_what_all_ranks_know_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in enumerate(["infoxlm: diverged\n", ""]):
        monkeypatch.setattr(dist, "rank", lambda group=None, rank=rank: rank)
        assert failures.end(dist.AllRanksError("diverged"), tmp_path, WHERE, "") == 1
        assert capsys.readouterr().err == said


def test_a_disk_too_full_for_the_cause_hides_it_on_the_screen_from_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failures").write_text("")  # so the folder cannot be made
    assert failures.end(Gone(), tmp_path, WHERE, "") == 1
    assert "rank 1 (process 2 on b) is gone" in capsys.readouterr().err


def test_a_host_that_is_lost_whole_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [failures.Place(host, rank) for rank, host in enumerate("aabb")]
    assert failures.end(Gone(), tmp_path, where, "") == 1
    line = capsys.readouterr().err
    assert "rank 1 (process 1 on a) is gone" in line and "all of b (ranks 2, 3) is gone" in line


def test_hosts_that_lost_each_other_say_so_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each host reports it, because one of them may be cut off from the screen."""
    where = [failures.Place(host, rank) for rank, host in enumerate("aabb")]
    for _ in range(2):  # at first they cannot know yet who else is alive
        said = []
        for rank in range(4):
            monkeypatch.setattr(dist, "rank", lambda group=None, rank=rank: rank)
            assert failures.end(Gone(), tmp_path, where, "Newest: 7") == 1
            said.append(capsys.readouterr().err)
    assert said[1] == said[3] == ""
    assert all("the network between a, b is broken. Newest: 7" in said[rank] for rank in (0, 2))


def test_a_full_disk_is_named_and_memory_is_not_guessed(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "rank", lambda group=None: 0)
    (small_disk / "failures").mkdir()
    (small_disk / "failures" / "rank-00001.json").write_text('{"rank": 1, "cau')  # half of a cause
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert failures.end(Gone(), small_disk, WHERE, "") == 1
    line = capsys.readouterr().err
    assert f"because the disk of {small_disk} is full" in line and "memory" not in line
