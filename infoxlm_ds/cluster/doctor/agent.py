"""The program that `infoxlm doctor` runs on each host: it reads one question a line and prints one answer a line."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

import infoxlm_ds
from infoxlm_ds.cluster.hosts import free_port_here
from infoxlm_ds.config import UserError, place
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.files import sha256_of
from infoxlm_ds.data.order import permuted

PROJECT = Path(infoxlm_ds.__file__).parent.parent
CODE = ("infoxlm_ds", "data_prep")


@dataclass(frozen=True)
class Gpu:
    """A GPU, and how much of its memory is in use."""

    name: str
    driver: str
    memory: int  # bytes
    used: int


@dataclass(frozen=True)
class Facts:
    """What the doctor knows of a host.

    `address`: where other hosts reach it, as DeepSpeed's launcher finds it; `packages`: version of each required
    package, empty if it is missing; `wrong`: packages with a version that does not work; `code`: hash of each source
    file; `memory`: available bytes; `locks`: lock files of extension builds, with their age in seconds."""

    address: str
    python: str
    packages: dict[str, str]
    wrong: list[str]
    code: dict[str, str]
    cores: int
    memory: int
    gpus: list[Gpu]
    locks: dict[str, float]


def facts() -> dict[str, Any]:
    """The `Facts` of this host, as JSON has them."""
    packages, wrong = _packages()
    return asdict(
        Facts(
            address=_address(),
            python=platform.python_version(),
            packages=packages,
            wrong=wrong,
            code=_code(),
            cores=len(os.sched_getaffinity(0)),
            memory=psutil.virtual_memory().available,
            gpus=_gpus(),
            locks=_locks(),
        )
    )


def _address() -> str:
    """The first address of `hostname -I`: DeepSpeed's launcher uses it as the first host's address."""
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return addresses[0] if addresses else "127.0.0.1"


def _packages() -> tuple[dict[str, str], list[str]]:
    """The version of each required package, and those that break a requirement."""
    versions, wrong = {}, []
    for line in importlib.metadata.requires("infoxlm-ds") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        versions[requirement.name] = version
        if not version or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'is missing'}, {requirement.specifier} is needed")
    return versions, wrong


def _code() -> dict[str, str]:
    files = sorted(path for name in CODE for path in (PROJECT / name).rglob("*.py"))
    return {str(p.relative_to(PROJECT)): sha256_of(p) for p in files}


def _gpus() -> list[Gpu]:
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [Gpu(name, driver, int(total) * 2**20, int(used) * 2**20) for name, driver, total, used in rows]


def _locks() -> dict[str, float]:
    """Lock files of extension builds. A killed build leaves its lock, and torch then waits for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return {str(path): time.time() - path.stat().st_mtime for path in folder.glob("**/lock")}


def port_is_free(port: int) -> bool:
    """Whether a program could listen at this port of this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def mark(folder: str, name: str) -> int:
    """Create a file that the other hosts must see. Returns the free bytes of its disk."""
    (Path(folder) / name).touch()
    return int(psutil.disk_usage(folder).free)


def marks(folder: str, beginning: str) -> list[str]:
    """Names of the files that this host sees."""
    return [path.name for path in Path(folder).glob(f"{beginning}*")]


def unmark(folder: str, name: str) -> None:
    """Remove the file that `mark` created."""
    (Path(folder) / name).unlink(missing_ok=True)


def read_corpus(path: str, part: int, parts: int, seconds: float) -> dict[str, Any]:
    """Check all names, sizes and indices, and read packs for so many seconds. Each host, number `part` of `parts`,
    starts at another pack. UserError names the first damage."""
    corpus = Corpus(place(path))
    packs = [(number, pack) for number, source in enumerate(corpus.sources) for pack in range(source.packs)]
    deadline, read = time.monotonic() + seconds, 0
    while read < len(packs) and time.monotonic() < deadline:
        at = (read + part * len(packs) // parts) % len(packs)
        corpus.pack.__wrapped__(*packs[permuted(at, len(packs), 0)])
        read += 1
    return {"packs": len(packs), "read": read, "sha256": corpus.manifest.sha256}


def exchange(rank: int, address: str, port: int) -> dict[str, float]:
    """See `network.exchange`."""
    from infoxlm_ds.cluster.doctor.network import exchange as measure  # imports torch

    return measure(rank, address, port)


QUESTIONS: dict[str, Callable[..., Any]] = {
    "facts": facts,
    "clock": time.time,
    "port_is_free": port_is_free,
    "free_port": free_port_here,
    "mark": mark,
    "marks": marks,
    "unmark": unmark,
    "read_corpus": read_corpus,
    "exchange": exchange,
}


def main() -> None:
    """Answer questions until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what a library prints is not read as an answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": QUESTIONS[request["question"]](**request["arguments"])}
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
