"""The hosts of a cluster: reads the hostfile and builds ssh commands."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from infoxlm_ds.config import UserError

# ssh never asks for a password, and notices within a minute that a host is gone: TCP alone takes hours.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"


def read_hostfile(path: Path) -> dict[str, int]:
    """The number of slots (ranks) of each host, in the file's order. UserError if a line is not `HOST slots=N`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such hostfile: write one like hostfile.example") from None
    except OSError as error:
        raise UserError(f"{path}: the hostfile cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: write it like hostfile.example") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (text := line.partition("#")[0].strip()):
            continue
        match = re.fullmatch(r"([\w.@-]+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise UserError(f"{path}, line {number}: {line.strip()!r} is not of the form HOST slots=NUMBER")
        if match[1] in slots:
            raise UserError(f"{path}, line {number}: {match[1]} is listed twice: write one line with all its slots")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"{path} names no host: write it like hostfile.example")
    return slots


def ssh_options() -> list[str]:
    """Options for ssh. The user's own come first, because ssh uses the first value of an option."""
    return [*os.environ.get("PDSH_SSH_ARGS_APPEND", "").split(), *SSH_OPTIONS.split()]


def python_there(host: str, *arguments: str) -> list[str]:
    """The ssh command that runs the same Python in the same folder on a host, with the project's code."""
    words = " ".join(shlex.quote(word) for word in (sys.executable, *arguments))
    folder = shlex.quote(str(Path.cwd()))
    return ["ssh", *ssh_options(), host, f"cd {folder} && PYTHONPATH={folder} exec {words}"]


def last_words(stderr: str, code: int) -> str:
    """Why a program ended early: its last line on stderr, or else its exit code."""
    return (stderr.strip().splitlines() or [f"exit code {code}"])[-1]


def free_port_here() -> int:
    """A free port of this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def free_port(host: str) -> int:
    """A free port of a host. UserError if ssh cannot run Python there."""
    find = "from infoxlm_ds.cluster.hosts import free_port_here; print(free_port_here())"
    done = subprocess.run(python_there(host, "-c", find), capture_output=True, text=True, check=False)
    if done.returncode:
        error = last_words(done.stderr, done.returncode)
        raise UserError(f"{host} cannot run {sys.executable} in {Path.cwd()}: {error}; try `infoxlm doctor --hostfile`")
    return int(done.stdout.split()[-1])  # its shell may print something before
