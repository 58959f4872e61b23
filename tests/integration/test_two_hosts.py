"""Ranks on two hosts, started by `deepspeed --hostfile` over ssh: what is lost between them, and going on without."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infoxlm_ds.checkpoint.store import Store, damage_of
from tests.corpus import ROOT
from tests.distributed.ranks import run_ranks
from tests.integration.commands import INFOXLM, read_losses, train_here, wait_for_steps, write_recipe
from tests.integration.hosts import Hosts

pytestmark = [pytest.mark.slow, pytest.mark.two_hosts, pytest.mark.timeout(600)]

STEPS = {"learning_rate": 1e-2, "eps": 1e-3, "steps": 50, "warmup": 2}


def _start(hosts: Hosts, *command: str | Path) -> subprocess.Popen[str]:
    # As a user's own option, which counts before ours: the end of a connection is noticed within seconds.
    environment = dict(hosts.environment) | {
        "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=1 -o ServerAliveCountMax=5"
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _train(hosts: Hosts, *arguments: str | Path) -> subprocess.Popen[str]:
    return _start(hosts, INFOXLM, "train", "--hostfile", hosts.folder / "hostfile", *arguments)


def _end(process: subprocess.Popen[str], hosts: Hosts) -> str:
    """What the launcher said until nothing was left on any host."""
    output, _ = process.communicate(timeout=120)
    hosts.wait_until_empty()
    return output


def _told(output: str) -> str:
    lines = [line for line in output.splitlines() if ": infoxlm: " in line]
    assert lines and "Traceback" not in output, output
    return lines[-1]


def test_two_hosts_give_the_losses_of_one_and_go_on_when_their_network_was_lost(
    corpus: Path, tmp_path: Path, hosts: Hosts
) -> None:
    """By the README's plain command, at ZeRO 1, with one host slow to start."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    recipe = write_recipe(corpus, run, optimizer=STEPS, timeout={"step": 5})
    assert run_ranks(train_here, 2, recipe, f"run={whole}") == [0, 0]
    first, second = hosts.hosts
    second.configure('ForceCommand sleep 5; eval "$SSH_ORIGINAL_COMMAND"\n')
    deepspeed = Path(sys.executable).with_name("deepspeed")
    own = tmp_path / "deepspeed_env"  # what DeepSpeed gives to hosts; the number of threads is part of bit-equality
    own.write_text("OMP_NUM_THREADS=1\n")
    plain = (deepspeed, "--hostfile", hosts.hostfile(), "infoxlm_ds/train.py", recipe)
    process = _start(hosts, "env", f"DS_ENV_FILE={own}", *plain)
    wait_for_steps(process, run, 10)
    second.link("down")
    output = _end(process, hosts)
    second.link("up")
    second.configure("")
    newest = Store(run).latest()
    assert process.returncode not in (0, 2) and newest is not None and damage_of(newest) == ""
    told = _told(output)
    assert told.startswith(first.name) and "network between node-1, node-2 is broken" in told and newest.name in told

    process = _train(hosts, recipe)
    output = _end(process, hosts)
    assert process.returncode == 0, output
    assert read_losses(run) == read_losses(whole)  # bit-equal


def test_a_run_goes_on_without_a_host_that_died_and_with_it_when_it_is_back(
    corpus: Path, tmp_path: Path, hosts: Hosts
) -> None:
    """At ZeRO 3, on the same batches. A shell would make something else of the folder's name."""
    run, whole = tmp_path / "a run, 100%h $HOME's", tmp_path / "whole"
    engine = str(ROOT / "ds_configs" / "zero3_fp32.json")
    recipe = write_recipe(corpus, run, optimizer=STEPS, engine=engine)
    arguments = (recipe, f"run={run}", "probe.languages=[de, ru]")
    assert run_ranks(train_here, 2, recipe, f"run={whole}") == [0, 0]
    first, second = hosts.hosts

    hosts.hostfile(first, second)
    process = _train(hosts, *arguments)
    wait_for_steps(process, run, 10)
    (rank,) = second.ranks()
    rank.kill()
    told = _told(_end(process, hosts))
    assert read_losses(run).items() <= read_losses(whole).items()  # up to there bit-equal
    assert process.returncode == 1 and told.startswith(first.name)
    assert "rank 1 (process " in told and f" on {second.name}) is gone without a message" in told

    hosts.hostfile(first)
    process = _train(hosts, *arguments)
    at = max(read_losses(run))
    wait_for_steps(process, run, int(at) + 10)
    process.send_signal(signal.SIGTERM)
    output = _end(process, hosts)
    assert process.returncode == 75 and "with ranks 2 -> 1" in output, output

    hosts.hostfile(first, second)
    process = _train(hosts, *arguments)
    output = _end(process, hosts)
    assert process.returncode == 0, output
    assert read_losses(run).keys() == read_losses(whole).keys()
    assert list(read_losses(run).values()) == pytest.approx(list(read_losses(whole).values()), rel=1e-3)


def test_a_host_that_does_not_come_in_time_ends_the_start_everywhere(
    corpus: Path, tmp_path: Path, hosts: Hosts
) -> None:
    first, second = hosts.hosts
    second.configure('ForceCommand sleep 18; eval "$SSH_ORIGINAL_COMMAND"\n')
    hosts.hostfile()
    process = _train(hosts, write_recipe(corpus, tmp_path / "run", timeout={"join": 5}))
    output = _end(process, hosts)
    second.configure("")
    assert process.returncode == 1
    told = [line for line in output.splitlines() if "did not meet the other ranks within 5 seconds" in line]
    assert [line.partition(":")[0] for line in told] == [first.name, second.name] and "1/2" in told[0], output


def test_a_request_to_stop_reaches_ranks_that_are_still_starting(corpus: Path, tmp_path: Path, hosts: Hosts) -> None:
    hosts.hostfile()
    process = _train(hosts, write_recipe(corpus, tmp_path / "run", optimizer=STEPS))
    deadline = time.monotonic() + 60
    while not all(host.runs("deepspeed.launcher.launch") for host in hosts.hosts):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = _end(process, hosts)
    assert process.returncode == 75, output


def test_a_host_out_of_reach_is_one_line(corpus: Path, tmp_path: Path, hosts: Hosts) -> None:
    (hosts.folder / "hostfile").write_text("node-9 slots=1\n")
    process = _train(hosts, write_recipe(corpus, tmp_path / "run"))
    output, _ = process.communicate(timeout=60)
    said, line = output.splitlines()
    assert said.startswith("reading ")
    assert process.returncode == 2 and line.startswith("infoxlm: node-9 cannot run") and "doctor" in line
    assert not (tmp_path / "run").exists()
