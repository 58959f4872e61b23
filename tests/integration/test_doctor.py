"""`infoxlm doctor` on hosts that are well, and on hosts where everything is wrong that it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.corpus import ROOT, write_corpus
from tests.integration.commands import INFOXLM, infoxlm, infoxlm_here, write_recipe
from tests.integration.hosts import Host, Hosts
from tests.trouble import leads_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Findings = dict[str, list[dict[str, str]]]


def _doctor(hosts: Hosts, hostfile: Path, *arguments: str | Path, **environment: str) -> tuple[int, Findings, str]:
    """The exit code, the findings by check, and what was on the screen."""
    out = hosts.folder / "findings.json"
    command = [INFOXLM, "doctor", "--hostfile", hostfile, "--json", out, *arguments]
    run = dict(hosts.environment) | environment
    done = subprocess.run(command, cwd=ROOT, env=run, capture_output=True, text=True, timeout=200, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    found: Findings = {}
    for finding in json.loads(out.read_text()):
        found.setdefault(finding["check"], []).append(finding)
    return done.returncode, found, done.stdout


@pytest.mark.two_hosts
def test_all_is_well_on_two_hosts(corpus: Path, tmp_path: Path, hosts: Hosts) -> None:
    code, found, screen = _doctor(hosts, hosts.hostfile(), write_recipe(corpus, tmp_path / "run"))
    assert code == 0 and all(f["level"] == "ok" for of_check in found.values() for f in of_check), screen
    checks = "hostfile pdsh recipe names ssh code packages devices clock port network disk corpus memory"
    assert {*checks.split(), "JIT lock", "run folder"} == found.keys()
    assert not list(tmp_path.glob(".doctor*")) and not (tmp_path / "run").exists()
    hosts.wait_until_empty()


def _lay_over(host: Host, path: Path, other: Path) -> None:
    """On this host alone, `path` is `other`."""
    host.run("mount", "--bind", other, path)


@pytest.mark.two_hosts
def test_everything_that_can_be_wrong_is_named_with_its_remedy(corpus: Path, tmp_path: Path, hosts: Hosts) -> None:
    first, second = hosts.hosts
    own = tmp_path / "own"  # what the second host has in place of the common files
    own.mkdir()
    laid: list[Path] = []

    def differs(path: Path, text: str) -> None:
        other = own / f"{len(laid)}"
        other.write_text(text)
        _lay_over(second, path, other)
        laid.append(path)

    code = ROOT / "infoxlm_ds" / "objective.py"
    differs(code, code.read_text() + "\n")
    (metadata,) = Path(pytest.__file__).parent.parent.glob("safetensors-*.dist-info/METADATA")
    differs(metadata, metadata.read_text().replace("\nVersion: ", "\nVersion: 0.0.", 1))
    shard = next(corpus.glob("*/*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    (own / "shard").write_bytes(data)
    _lay_over(second, shard, own / "shard")
    laid.append(shard)
    elsewhere = tmp_path / "shared"
    elsewhere.mkdir()
    (own / "folder").mkdir()
    _lay_over(second, elsewhere, own / "folder")
    laid.append(elsewhere)
    extensions = tmp_path / "extensions"
    (extensions / "cpu_adam").mkdir(parents=True)
    (extensions / "cpu_adam" / "lock").touch()
    os.utime(extensions / "cpu_adam" / "lock", (time.time() - 7200,) * 2)
    faked = f"SetEnv TORCH_EXTENSIONS_DIR={extensions}"
    (faketime,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    faked += f" LD_PRELOAD={faketime} FAKETIME=-90s DONT_FAKE_MONOTONIC=1\n"
    second.configure(faked)
    listener = subprocess.Popen(first.command("python3", "-c", LISTEN))
    # Nothing but ssh comes through from the second host.
    for rule in ("pref 10 ipproto tcp sport 2222 lookup main", "pref 20 ipproto tcp blackhole"):
        second.run("ip", "rule", "add", *rule.split())
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("node-1 slots=1\nnode-2 slots=3\n")
    try:
        large = ("model.layers=48", "model.width=8192", "model.feed_forward=32768")
        exit_code, found, screen = _doctor(hosts, hostfile, write_recipe(corpus, elsewhere / "run"), *large)
    finally:
        for rule in ("pref 10", "pref 20"):
            second.run("ip", "rule", "del", *rule.split())
        listener.kill()
        listener.wait()
        second.configure("")
        for path in laid:
            second.run("umount", path)
    assert exit_code == 1
    for check, level, words, remedy in [
        ("code", "failure", "node-2 has another infoxlm_ds/objective.py", "same commit"),
        ("packages", "failure", "node-2: safetensors 0.0.", "requirements.lock"),
        ("devices", "warning", "node-2 has 2 cores for 3 CPU ranks", "slots=2"),
        ("JIT lock", "failure", f"node-2: {extensions}/cpu_adam/lock is 1", "rm "),
        ("clock", "failure", "seconds", "chrony"),
        ("port", "warning", "29500", "--master_port"),
        ("network", "failure", "node-1 and node-2 cannot connect", "open all ports"),
        ("run folder", "failure", f"{elsewhere} is not the same folder on node-1 and on node-2", "share"),
        ("disk", "failure", "two checkpoints need", "free some space"),
        ("corpus", "failure", f"node-2: {shard}", "restore"),
        ("memory", "failure", "GiB planned", "infoxlm plan"),
    ]:
        one = next((f for f in found[check] if f["level"] == level), {"what": "", "remedy": ""})
        assert words in one["what"] and remedy in one["remedy"], (check, screen)
    assert leads_to("A port is taken") in screen and leads_to("The lock of a killed build") in screen
    hosts.wait_until_empty()


LISTEN = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(600)"


@pytest.mark.two_hosts
def test_hosts_that_run_nothing_are_told_apart(corpus: Path, tmp_path: Path, hosts: Hosts) -> None:
    """A name without an address, a host that wants a password, and one without our environment."""
    first, second = hosts.hosts
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("node-1 slots=1\nnode-2 slots=1\nnode-9.invalid slots=1\n")
    first.configure("AuthorizedKeysFile none\n")
    (tmp_path / "nothing").mkdir()
    _lay_over(second, ROOT / "infoxlm_ds", tmp_path / "nothing")
    try:
        only_ssh = str(hosts.folder / "bin")
        code, found, screen = _doctor(hosts, hostfile, write_recipe(corpus, tmp_path / "run"), PATH=only_ssh)
    finally:
        first.configure("")
        second.run("umount", ROOT / "infoxlm_ds")
    assert code == 1
    assert "which 3 ranks do not divide" in found["recipe"][0]["what"]
    assert found["pdsh"][0]["level"] == "failure" and "install" in found["pdsh"][0]["remedy"]
    assert "node-9.invalid has no address" in found["names"][0]["what"]
    said = {f["what"].split()[0]: f for f in found["ssh"]}
    assert "Permission denied" in said["node-1"]["what"] and said["node-1"]["remedy"] == "ssh-copy-id node-1"
    assert "No module named" in said["node-2"]["what"] and str(ROOT) in said["node-2"]["remedy"]
    assert "node-9.invalid" in said and leads_to("ssh and pdsh") in screen

    hostfile.write_text("node-1\n")
    code, found, screen = _doctor(hosts, hostfile, PATH=str(INFOXLM.parent))
    assert code == 1 and found.keys() == {"hostfile"} and "line 1" in screen


def test_the_doctor_works_alone(corpus: Path, tmp_path: Path, small_disk: Path) -> None:
    """And on a disk that is too small, with a corpus that is gone."""
    done = infoxlm("doctor")
    assert done.returncode == 0 and "failure" not in done.stdout and "packages" in done.stdout, done.stdout
    recipe = write_recipe(corpus, small_disk)
    done = infoxlm_here("doctor", recipe, "model.layers=12", "model.width=256", f"corpus={tmp_path}")
    assert done.returncode == 1
    failures = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("failure")]
    assert failures == ["disk", "corpus"], done.stdout
    done = infoxlm_here("doctor", tmp_path / "none.yaml")
    assert done.returncode == 1 and "none.yaml: no such recipe" in done.stdout


@pytest.mark.two_hosts
def test_hosts_that_differ_in_devices_speed_rights_and_corpus(corpus: Path, tmp_path: Path, hosts: Hosts) -> None:
    """GPUs as nvidia-smi lists them; here a script stands in for it."""
    first, second = hosts.hosts
    listing = tmp_path / "bin" / "nvidia-smi"
    listing.parent.mkdir()
    listing.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 81559, 40000'\n")
    listing.chmod(0o755)
    (tmp_path / "shared").mkdir()
    recipe = write_recipe(corpus, tmp_path / "shared" / "run")
    other = write_corpus(tmp_path, rows=50)
    locks = tmp_path / "extensions" / "cpu_adam" / "lock"
    locks.parent.mkdir(parents=True)
    locks.touch()
    first.configure(f"SetEnv PATH={listing.parent}:/usr/bin:/bin TORCH_EXTENSIONS_DIR={locks.parent.parent}\n")
    _lay_over(second, corpus, other)
    _lay_over(second, tmp_path / "shared", tmp_path / "shared")
    second.run("mount", "-o", "remount,ro,bind", tmp_path / "shared")
    slow = ["dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "64k", "latency", "400ms"]
    second.run("tc", "qdisc", "add", *slow)
    (hosts.folder / "hostfile").write_text("node-1 slots=3\nnode-2 slots=1\n")
    try:
        code, found, screen = _doctor(hosts, hosts.folder / "hostfile", recipe)
    finally:
        first.configure("")
        second.run("tc", "qdisc", "del", *slow[:3])
        for path in (corpus, tmp_path / "shared"):
            second.run("umount", path)
    assert code == 1
    for check, level, words in [
        ("devices", "failure", "node-1 has 1 GPUs, 3 wanted"),
        ("devices", "failure", "node-2 has 0 GPUs, 1 wanted"),
        ("devices", "warning", "GPU 0 of node-1 has 41.9 of 86 GB in use"),
        ("packages", "failure", "node-1 has GPUs and a torch without CUDA"),
        ("JIT lock", "warning", f"node-1: {locks}: an extension is being built"),
        ("network", "warning", "node-1 and node-2: "),
        ("run folder", "failure", "node-2 cannot write to"),
        ("corpus", "failure", "is another corpus on node-"),
    ]:
        assert any(f["level"] == level and words in f["what"] for f in found[check]), (check, screen)
