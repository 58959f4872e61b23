"""`infoxlm doctor`: checks everything that a run needs, before it starts."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from infoxlm_ds.cluster.doctor import judge
from infoxlm_ds.cluster.doctor.agent import Facts, Gpu
from infoxlm_ds.cluster.doctor.crew import Crew, NoAnswer
from infoxlm_ds.cluster.doctor.findings import Finding, failure, ok, warning
from infoxlm_ds.cluster.doctor.network import PATIENCE
from infoxlm_ds.cluster.environment import ranks_here
from infoxlm_ds.cluster.hosts import read_hostfile
from infoxlm_ds.config import Place, Recipe, UserError
from infoxlm_ds.planner.cost import wire
from infoxlm_ds.planner.memory import checkpoint_bytes, memory
from infoxlm_ds.planner.report import GIB, Wishes, read_setting
from infoxlm_ds.planner.workload import Setting
from infoxlm_ds.reading import load_recipe

PORT = 29500  # DeepSpeed's default
PARTNERS = 15  # a host exchanges data with so many others: with all of them up to 16 hosts
READING = 10.0  # seconds for which each host reads the corpus


def examine(hostfile: Path | None, recipe: Path | None, overrides: list[str]) -> Iterator[Finding]:
    """Yield all findings, one after the other. If a check fails, the checks that depend on it are left out."""
    slots: dict[str, int] = {}
    if hostfile is not None:
        try:
            slots = read_hostfile(hostfile)
        except UserError as error:
            yield failure("hostfile", str(error), "see hostfile.example")
            return
        yield ok("hostfile", f"{len(slots)} hosts, {sum(slots.values())} slots")
        if shutil.which("pdsh") is None:
            yield failure("pdsh", "is not installed here; it starts the ranks on the hosts", "install pdsh")
        else:
            yield ok("pdsh", "is installed")
    loaded, setting = None, None
    if recipe is not None:
        try:
            loaded = load_recipe(recipe, overrides)
            ranks = sum(slots.values()) or ranks_here(loaded.batch)
            setting = read_setting(recipe, overrides, Wishes(ranks))
            yield ok("recipe", f"{recipe}, {setting.world} ranks")
        except UserError as error:
            yield failure("recipe", str(error), "correct it")
    unknown = [finding for host in slots if (finding := _resolved(host))]
    yield from unknown
    if slots and not unknown:
        yield ok("names", "all hosts have an address")
    with closing(Crew(list(slots) or [None])) as crew:
        facts: dict[str, Facts] = {}
        yield from _meet(crew, facts, over_ssh=bool(slots))
        if facts:
            yield from _judge(crew, facts, slots, loaded, setting)


def _resolved(host: str) -> Finding | None:
    """Look up a host's address as ssh does it, with ssh's own configuration. Returns a failure if there is none."""
    settings = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, check=False).stdout.splitlines()
    name = next((line.split()[1] for line in settings if line.startswith("hostname ")), host)
    try:
        socket.getaddrinfo(name, 22)
    except OSError:
        return failure("names", f"{host} has no address", "correct the hostfile, DNS, /etc/hosts or ~/.ssh/config")
    return None


def _meet(crew: Crew, facts: dict[str, Facts], over_ssh: bool) -> Iterator[Finding]:
    """Ask all hosts for their facts, and drop those that do not answer."""
    for host, answer in crew.ask("facts").items():
        if isinstance(answer, NoAnswer):
            yield failure("ssh", f"{host} does not run the project's Python: {answer}", _remedy(host, str(answer)))
            crew.dismiss([host])
        else:
            facts[host] = Facts(**answer | {"gpus": [Gpu(**gpu) for gpu in answer["gpus"]]})
    if facts and over_ssh:
        yield ok("ssh", f"answered without a password: {', '.join(facts)}")


def _remedy(host: str, error: str) -> str:
    if "denied" in error:
        return f"ssh-copy-id {host}"
    if any(word in error for word in ("No such file", "not found", "No module named", "ModuleNotFound")):
        return f"copy code and environment to {host}, to the same path: {Path.cwd()}"
    return f"try `ssh {host} true`"


def _judge(
    crew: Crew, facts: Mapping[str, Facts], slots: Mapping[str, int], recipe: Recipe | None, setting: Setting | None
) -> Iterator[Finding]:
    yield from judge.code(facts)
    yield from judge.packages(facts)
    yield from judge.devices(facts, slots)
    yield from judge.locks(facts)
    if slots:
        yield from judge.clocks(_clocks(crew))
    yield from _port(crew)
    if len(crew.hosts) > 1:
        yield from judge.network(_exchanges(crew, facts), sum(wire(setting).values()) if setting else None)
    if recipe is not None:
        yield from _run_folder(crew, recipe.run, 2 * checkpoint_bytes(setting) if setting else 0)
        yield from _corpus(crew, recipe.corpus)
    if setting is not None:
        yield from _memory(setting, facts, slots)


def _clocks(crew: Crew) -> dict[str, float]:
    """Seconds by which each host's clock is ahead of this one's, from the fastest of three answers."""
    ahead = {}
    for host in crew.hosts:
        answers = []
        for _ in range(3):
            asked = time.time()
            remote = crew.ask("clock", {host: {}})[host]
            took = time.time() - asked
            answers.append((took, remote - asked - took / 2))
        ahead[host] = min(answers)[1]
    return ahead


def _port(crew: Crew) -> Iterator[Finding]:
    first = crew.hosts[0]
    if crew.ask("port_is_free", {first: {"port": PORT}})[first] is True:
        yield ok("port", f"{PORT} is free on {first}")
    else:
        remedy = (
            "stop the program that listens there, or use `deepspeed` --master_port; `infoxlm train` uses a free port"
        )
        yield warning("port", f"{PORT}, DeepSpeed's default, is taken on {first}", remedy)


def _exchanges(crew: Crew, facts: Mapping[str, Facts]) -> dict[tuple[str, str], Any]:
    """Measure pairs of hosts in the rounds of a tournament: in a round, disjoint pairs exchange at the same time."""
    hosts: list[str | None] = [*crew.hosts] + [None] * (len(crew.hosts) % 2)
    results: dict[tuple[str, str], Any] = {}
    for _ in range(min(len(hosts) - 1, PARTNERS)):
        half = len(hosts) // 2
        pairs = [(a, b) for a, b in zip(hosts[:half], reversed(hosts[half:]), strict=True) if a and b]
        ports = crew.ask("free_port", {a: {} for a, _ in pairs})
        asked: dict[str, dict[str, Any]] = {}
        for a, b in pairs:
            meeting = {"address": facts[a].address, "port": ports[a]}
            asked |= {a: {"rank": 0} | meeting, b: {"rank": 1} | meeting}
        answers = crew.ask("exchange", asked, seconds=3 * PATIENCE)
        results |= {(a, b): answers[b] if isinstance(answers[a], dict) else answers[a] for a, b in pairs}
        hosts = [hosts[0], hosts[-1], *hosts[1:-1]]
    return results


def _run_folder(crew: Crew, run: Path, needed: int) -> Iterator[Finding]:
    """Each host creates a file in the run's folder, and all hosts must see it. Then check the free space."""
    folder = run.absolute()
    while not folder.is_dir():
        folder = folder.parent
    beginning = f".doctor-{uuid.uuid4().hex[:8]}-"
    names = {host: {"folder": str(folder), "name": f"{beginning}{host}"} for host in crew.hosts}
    left = crew.ask("mark", names)
    bad = {host: answer for host, answer in left.items() if isinstance(answer, NoAnswer)}
    for host, why in bad.items():
        yield failure(
            "run folder", f"{host} cannot write to {folder}: {why}", "correct `run`, the mount or permissions"
        )
    writers = [host for host in crew.hosts if host not in bad]
    seen = {host: [] if isinstance(s, NoAnswer) else s for host, s in _marks(crew, folder, beginning, writers).items()}
    elsewhere = [host for host in writers if not all(names[other]["name"] in seen[host] for other in writers)]
    if elsewhere:
        what = f"{folder} is not the same folder on {' and on '.join(elsewhere)}"
        yield failure(
            "run folder",
            what,
            "put `run` on a file system that all hosts share: a checkpoint needs the files of all ranks there",
        )
    crew.ask("unmark", names)
    if writers and not bad and not elsewhere:
        yield ok("run folder", f"{folder}: writable and shared{judge.everywhere(left)}")
    if writers and needed:
        yield _disk(min((left[host], host) for host in writers), folder, needed)


def _marks(crew: Crew, folder: Path, beginning: str, writers: list[str]) -> dict[str, Any]:
    """The files that each host sees. If some are missing, ask again a moment later: NFS shows new files late."""
    question = {host: {"folder": str(folder), "beginning": beginning} for host in crew.hosts}
    for _ in range(6):
        seen = crew.ask("marks", question)
        if all(isinstance(listed, list) and len(listed) == len(writers) for listed in seen.values()):
            break
        time.sleep(0.5)
    return seen


def _disk(least: tuple[int, str], folder: Path, needed: int) -> Finding:
    free, host = least
    what = f"{free / GIB:.1f} GiB free in {folder} on {host}; two checkpoints need {needed / GIB:.1f}"
    return (
        ok("disk", what) if free > needed else failure("disk", what, "free some space, or set `run` to a larger disk")
    )


def _corpus(crew: Crew, corpus: Place) -> Iterator[Finding]:
    parts = len(crew.hosts)
    asked = {
        host: {"path": str(corpus), "part": i, "parts": parts, "seconds": READING} for i, host in enumerate(crew.hosts)
    }
    read = crew.ask("read_corpus", asked, seconds=600)
    readers = {host: answer for host, answer in read.items() if isinstance(answer, dict)}
    for host in read.keys() - readers.keys():
        yield failure("corpus", f"{host}: {read[host]}", "restore it there; `infoxlm prep verify` checks all of it")
    for host in judge.odd_ones({host: answer["sha256"] for host, answer in readers.items()}):
        yield failure("corpus", f"{corpus} is another corpus on {host}", "copy the same corpus to every host")
    if len(readers) == len(read):
        least = min(readers.values(), key=lambda answer: answer["read"])
        part = "" if least["read"] == least["packs"] else f" in {READING:g} seconds; `infoxlm prep verify` reads all"
        yield ok(
            "corpus", f"{corpus}: {least['read']:,} of {least['packs']:,} packs read{judge.everywhere(read)}{part}"
        )


def _memory(s: Setting, facts: Mapping[str, Facts], slots: Mapping[str, int]) -> Iterator[Finding]:
    """Compare the plan's peak with the smallest GPU; without GPUs, with the host's memory."""
    needs = memory(s)
    remedy = "use more ranks, a higher ZeRO stage or smaller lanes: `infoxlm plan` shows what needs the memory"
    for host, of_host in facts.items():
        ranks = slots.get(host, s.world)
        on_host = needs.host if of_host.gpus else needs.peak + needs.host
        demands = [("memory", ranks * on_host, of_host.memory)]
        demands += (
            [(f"{of_host.gpus[0].name}", needs.peak, min(g.memory for g in of_host.gpus))] if of_host.gpus else []
        )
        for device, planned, available in demands:
            line = f"{host}, {device}: {planned / GIB:.1f} GiB planned, {available / GIB:.1f} available"
            if planned > available:
                yield failure("memory", line, remedy)
            elif planned > 0.9 * available:
                yield warning("memory", f"{line}: CUDA and buffers need memory too", remedy)
            else:
                yield ok("memory", line)
