"""Hostfiles, and how a rank learns its place."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from infoxlm_ds.cluster.environment import first_of_nodelist, from_slurm, interface_towards
from infoxlm_ds.cluster.hosts import read_hostfile
from infoxlm_ds.cluster.launch import environment_lines
from infoxlm_ds.config import UserError
from tests.corpus import ROOT


def test_the_example_is_a_hostfile() -> None:
    assert read_hostfile(ROOT / "hostfile.example") == {"node-1": 8, "node-2": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=1\nb 2\n", r"line 2: 'b 2' is not of the form HOST slots=NUMBER"),
        ("a slots=0\n", "line 1: 'a slots=0'"),
        ("a slots=1\n\na slots=1\n", "line 3: a is listed twice"),
        ("# none\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_named_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_hostfile(path)
    with pytest.raises(UserError, match="no such hostfile"):
        read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[03-17,21],login1", "gpu03"),
        ("rack[2-3]n[05,07]-ib,x", "rack2n05-ib"),
    ],
)
def test_the_first_host_of_slurms_short_form(nodes: str, first: str) -> None:
    assert first_of_nodelist(nodes) == first


def test_a_task_of_srun_knows_its_rank() -> None:
    """If one GPU is bound to each task, each task's GPU is number 0. If all GPUs are visible, each task
    has its own number."""
    environment = {
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[01-02]",
        "SLURM_JOB_ID": "1234567",
    }
    found = from_slurm(environment, gpus=8)
    assert found == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu01",
        "MASTER_PORT": "24567",
    }
    assert from_slurm(environment, gpus=1)["LOCAL_RANK"] == "0"
    assert from_slurm(environment, gpus=0)["LOCAL_RANK"] == "3"


def test_the_interface_is_the_one_with_the_address_that_reaches_the_host() -> None:
    assert interface_towards("127.0.0.1") == interface_towards("nowhere.invalid") == "lo"
    for name, found in psutil.net_if_addrs().items():
        for one in found:
            if one.family.name == "AF_INET":
                assert interface_towards(one.address) == name


def test_the_environment_that_travels_is_quoted_for_a_remote_shell_and_carries_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=WARN\n")
    lines = environment_lines(
        {
            "NCCL_DEBUG": "INFO",
            "HF_HOME": 'a "$b" `c` \\d %h',
            "HF_TOKEN": "secret",
            "EDITOR": "vi",
            "FI_PROVIDER": "efa",
        }
    )
    assert lines[:3] == ["FI_PROVIDER=efa", 'HF_HOME=a \\"\\$b\\" \\`c\\` \\\\d %%h', "NCCL_DEBUG=INFO"]
    assert lines[-1] == "NCCL_DEBUG=WARN"  # the user's own setting is used
    assert not any("secret" in line or "vi" in line.split("=")[1:] for line in lines)
