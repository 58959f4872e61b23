"""The hosts of a cluster: the hostfile that names them, and ssh, which reaches them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from infoxlm_ds.config import UserError

# Never ask, and notice within a minute that a host is gone, which TCP alone does after hours.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the file's order: a rank each. UserError names a line that is not `HOST slots=N`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such hostfile: write one after hostfile.example") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (text := line.partition("#")[0].strip()):
            continue
        match = re.fullmatch(r"([\w.@-]+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise UserError(f"{path}, line {number}: {line.strip()!r} is not of the form HOST slots=NUMBER")
        if match[1] in slots:
            raise UserError(f"{path}, line {number}: {match[1]} is there twice: give it one line with all its slots")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"{path} names no host: write one after hostfile.example")
    return slots


def ssh_options() -> list[str]:
    """Of `ssh`, the user's own first: of several values the first one counts."""
    return [*os.environ.get("PDSH_SSH_ARGS_APPEND", "").split(), *SSH_OPTIONS.split()]


def python_there(host: str, *arguments: str) -> list[str]:
    """The command that runs this Python in this folder of a host, with the project's code."""
    words = " ".join(shlex.quote(word) for word in (sys.executable, *arguments))
    folder = shlex.quote(str(Path.cwd()))
    return ["ssh", *ssh_options(), host, f"cd {folder} && PYTHONPATH={folder} exec {words}"]


def last_words(stderr: str, code: int) -> str:
    """Why a program ended early: the last line that it wrote, or else its exit code."""
    return (stderr.strip().splitlines() or [f"exit code {code}"])[-1]


def free_port_here() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def free_port(host: str) -> int:
    """A port that nobody listens on there. UserError where ssh does not reach the host."""
    find = "from infoxlm_ds.hosts import free_port_here; print(free_port_here())"
    done = subprocess.run(python_there(host, "-c", find), capture_output=True, text=True, check=False)
    if done.returncode:
        said = last_words(done.stderr, done.returncode)
        raise UserError(f"{host} cannot run {sys.executable} in {Path.cwd()}: {said}; try `infoxlm doctor --hostfile`")
    return int(done.stdout.split()[-1])  # a shell there may have said something before
