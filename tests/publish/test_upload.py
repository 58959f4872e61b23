"""`infoxlm publish` uploads an export and nothing else, after asking, with the hub's own client."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infoxlm_ds.model.checksums import CHECKSUMS, write_checksums
from infoxlm_ds.model.sentence_vector import SentenceVector
from infoxlm_ds.monitor.history import History
from infoxlm_ds.publish.card import Facts, card
from infoxlm_ds.publish.hugging_face import write_hugging_face
from tests.publish.hub import Hub, running
from tests.publish.models import random_model

INFOXLM = str(Path(sys.executable).with_name("infoxlm"))
NAME = "team/model"


@pytest.fixture(scope="module")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export, with a card of a run that measured nothing."""
    folder = tmp_path_factory.mktemp("upload") / "my-model"
    trained = random_model("xlm-roberta", model_folder, SentenceVector(2, "mean"))
    trained.tokenizer.save_pretrained(folder)
    write_hugging_face(trained, folder)
    facts = Facts("my-model", ("hf",), trained, folder, {"step": 1, "world_size": 1}, History(()), [])
    (folder / "README.md").write_text(card(facts, False), encoding="utf-8")
    write_checksums(folder)
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as one:
        yield one


def _environment(hub: Hub, **variables: str) -> dict[str, str]:
    """The user's, without what other tests or the user say of the hub: no token of theirs is ever read."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    told = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nowhere"}
    return ours | told | variables


def _publish(hub: Hub, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, stdin = [INFOXLM, "publish", str(folder), *arguments], subprocess.DEVNULL
    return subprocess.run(command, env=_environment(hub, **variables), capture_output=True, text=True, stdin=stdin)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_uploaded_whole_in_one_commit(hub: Hub, exported: Path) -> None:
    refused = _publish(hub, exported, NAME)
    assert refused.returncode == 2 and "--yes" in refused.stderr and not hub.created
    done = _publish(hub, exported, NAME, "--yes", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/team/model/commit/1"
    assert hub.tokens == {"Bearer secret"} and hub.private == {NAME: True}
    assert hub.files == _files(exported) and hub.commits == 1 and hub.large


def test_what_others_put_into_the_folder_stays_here(hub: Hub, copy: Path) -> None:
    (copy / ".env").write_text("PASSWORD=1")
    (copy / "notes").mkdir()
    (copy / "notes" / "private.txt").write_text("not for others")
    assert _publish(hub, copy, NAME, "--yes").returncode == 0
    assert hub.files.keys() == {*json.loads((copy / CHECKSUMS).read_text()), CHECKSUMS}


def test_endpoint_wins_over_the_environment_and_a_bare_name_is_the_users(hub: Hub, exported: Path) -> None:
    done = _publish(hub, exported, "model", "--yes", "--endpoint", hub.address, HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 0, done.stderr
    assert hub.private == {"someone/model": False} and hub.files == _files(exported)


def test_a_repository_keeps_what_it_is_and_a_public_one_gets_nothing_private(hub: Hub, exported: Path) -> None:
    hub.private = {"team/open": False, "team/closed": True}
    refused = _publish(hub, exported, "team/open", "--yes", "--private")
    assert refused.returncode == 2 and "team/open exists and is public" in refused.stderr and not hub.files
    assert "to team/closed (private)" in _publish(hub, exported, "team/closed").stderr
    assert _publish(hub, exported, "team/closed", "--yes").returncode == 0
    assert hub.files == _files(exported) and not hub.created


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"\n", 1), (b"\x04", 1), (b"y\n", 0)])
def test_on_a_terminal_the_user_is_asked(hub: Hub, exported: Path, answer: bytes, code: int) -> None:
    ours, theirs = pty.openpty()
    command = [INFOXLM, "publish", str(exported), NAME]
    process = subprocess.Popen(command, env=_environment(hub), stdin=theirs, stdout=subprocess.PIPE, text=True)
    os.write(ours, answer)
    output, _ = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == code and "MB, to team/model (public)" in output
    assert hub.files == ({} if code else _files(exported)) and bool(hub.created) is not bool(code)


def _one_line(result: subprocess.CompletedProcess[str], code: int, said: str) -> None:
    (line,) = result.stderr.splitlines()
    assert line.startswith("infoxlm: ") and said in line and result.returncode == code, line


def test_what_is_wrong_on_this_side_is_one_line(hub: Hub, exported: Path, copy: Path, tmp_path: Path) -> None:
    home = {"HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    _one_line(_publish(hub, exported, NAME, "--yes", **home), 2, "there is no token: log in with `hf auth login`")
    _one_line(_publish(hub, exported, "team/model/more", "--yes"), 2, "cannot be a repository")
    _one_line(_publish(hub, exported, NAME, "--yes", "--endpoint", "hub"), 2, "--endpoint hub is no address")
    _one_line(_publish(hub, exported, NAME, "--yes", HF_HUB_OFFLINE="1"), 2, "HF_HUB_OFFLINE is set")
    _one_line(_publish(hub, tmp_path, NAME, "--yes"), 2, "give a folder that `infoxlm export` wrote")
    (copy / "README.md").write_text("# Mine")
    _one_line(_publish(hub, copy, NAME, "--yes"), 2, "README.md differs from what was written: export the run again")
    assert not hub.created and not hub.files


@pytest.mark.parametrize(
    ("where", "status", "code", "said"),
    [
        ("/api/models/", 401, 2, "refuses your token for team/model"),
        ("/api/repos/create", 403, 2, "refuses your token for team/model"),
        ("/preupload/", 403, 2, "refuses your token for team/model"),
        ("/api/repos/create", 500, 1, "did not take team/model"),
        ("/commit/", 500, 1, "did not take team/model"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, exported: Path, where: str, status: int, code: int, said: str
) -> None:
    hub.refuse = {where: status}
    _one_line(_publish(hub, exported, NAME, "--yes"), code, said)
    assert not hub.files


def test_a_hub_that_is_not_there_and_one_that_refuses_the_card_are_one_line(hub: Hub, copy: Path) -> None:
    _one_line(_publish(hub, copy, NAME, "--yes", HF_ENDPOINT="http://127.0.0.1:1"), 1, "did not take team/model")
    text = (copy / "README.md").read_text(encoding="utf-8")
    (copy / "README.md").write_text(text.replace("license: other", "license: ours"), encoding="utf-8")
    write_checksums(copy)
    _one_line(_publish(hub, copy, NAME, "--yes"), 1, "ours is not allowed")
    assert not hub.files
