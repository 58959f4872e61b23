"""Two hosts on one machine: each with a network, a host name, processes, mounts and an sshd of its own, on one bridge.

What they share is the file system, as hosts of a cluster share theirs. It takes root and the programs of TOOLS; nothing
of this machine is changed: its names are resolved by ssh's own configuration, through a wrapper on PATH.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh", "pkill", "mount", "/usr/sbin/sshd")
NAMES = ("node-1", "node-2")


class NoHosts(Exception):
    """Why hosts cannot be made here."""


@dataclass(frozen=True)
class Host:
    """`name` in the hostfile and of the host; `init`: its process number 1, an sshd."""

    name: str
    address: str
    init: psutil.Process
    settings: Path  # of its sshd

    def run(self, *words: str | Path) -> str:
        """The output of a program there. CalledProcessError where it fails."""
        done = subprocess.run(self.command(*words), check=True, capture_output=True, text=True, timeout=60)
        return done.stdout

    def command(self, *words: str | Path) -> list[str]:
        return ["nsenter", "--target", str(self.init.pid), "--all", f"--wd={Path.cwd()}", *map(str, words)]

    def link(self, state: str) -> None:
        """`down`: its network is gone, and nobody is told; `up`."""
        self.run("ip", "link", "set", "eth0", state)

    def configure(self, text: str) -> None:
        """Lines for its sshd, in place of earlier ones, for connections from now on."""
        self.settings.write_text(text)
        self.init.send_signal(signal.SIGHUP)
        time.sleep(0.5)  # it starts itself anew

    def processes(self) -> list[psutil.Process]:
        """All that was started there."""
        try:
            return [p for p in self.init.children(recursive=True) if p.name() != "sshd"]
        except psutil.NoSuchProcess:
            return []

    def runs(self, word: str) -> bool:
        """Whether a program with this word among its arguments runs there."""
        with suppress(psutil.Error):  # one that ends just now
            return any(word in process.cmdline() for process in self.processes())
        return False

    def ranks(self) -> list[psutil.Process]:
        """In order of their local ranks."""
        found = [p for p in self.processes() if "LOCAL_RANK" in p.environ() and not p.children()]
        return sorted(found, key=lambda p: int(p.environ()["LOCAL_RANK"]))


@dataclass(frozen=True)
class Hosts:
    """`environment`: what a program needs to reach them as if from a third host."""

    folder: Path
    hosts: tuple[Host, ...]
    environment: Mapping[str, str]

    def hostfile(self, *hosts: Host) -> Path:
        """One slot on each of these, or on all."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host.name} slots=1\n" for host in hosts or self.hosts))
        return path

    def wait_until_empty(self, seconds: float = 20) -> None:
        """Until nothing runs on any host."""
        deadline = time.monotonic() + seconds
        while left := [p for host in self.hosts for p in host.processes()]:
            assert time.monotonic() < deadline, [p.cmdline() for p in left]
            time.sleep(0.1)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """NoHosts where this machine does not allow them."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise NoHosts(f"no {', '.join(missing)}: install openssh-server, pdsh, iproute2 and procps")
    tag, net = f"ix{os.getpid()}", f"10.{os.getpid() % 200 + 20}.0"
    with ExitStack() as stack:
        try:
            _must("ip", "link", "add", tag, "type", "bridge")
            stack.callback(_try, "ip", "link", "del", tag)
            _must("ip", "address", "add", f"{net}.254/24", "dev", tag)
            _must("ip", "link", "set", tag, "up")
            (folder / "keys").mkdir(parents=True)
            for key in ("client", "host"):
                _must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "keys" / key))
            Path("/run/sshd").mkdir(exist_ok=True)
            addresses = {name: f"{net}.{i + 1}" for i, name in enumerate(NAMES)}
            hosts = tuple(_host(stack, tag, folder, name, addresses) for name in NAMES)
        except (subprocess.CalledProcessError, PermissionError) as error:
            raise NoHosts(f"{error}: {getattr(error, 'stderr', '')}".strip()) from None
        yield Hosts(folder, hosts, _client(folder, hosts))


def _host(stack: ExitStack, tag: str, folder: Path, name: str, addresses: Mapping[str, str]) -> Host:
    space = f"{tag}-{name}"
    end = f"{tag}{name[-1]}"
    _must("ip", "netns", "add", space)
    stack.callback(_try, "ip", "netns", "del", space)
    _must("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", space)
    stack.callback(_try, "ip", "link", "del", end)
    _must("ip", "link", "set", end, "master", tag, "up")
    for words in (f"address add {addresses[name]}/24 dev eth0", "link set eth0 up", "link set lo up"):
        _must("ip", "-n", space, *words.split())
    names = Path("/etc/netns") / space / "hosts"
    names.parent.mkdir(parents=True)
    stack.callback(shutil.rmtree, names.parent)
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {host}\n" for host, at in addresses.items()))
    settings = folder / f"sshd-{name}"
    settings.write_text(
        f"Include {folder}/{name}-*\nPort 2222\nHostKey {folder}/keys/host\n"
        f"AuthorizedKeysFile {folder}/keys/client.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
    )
    run_sshd = f"hostname {name}; exec /usr/sbin/sshd -D -f {settings} -E {settings}.log"
    space_words = ("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
    process = subprocess.Popen(["ip", "netns", "exec", space, *space_words, "sh", "-c", run_sshd])
    stack.callback(process.wait)
    stack.callback(process.kill)  # SIGKILL: unshare lets no other signal through, and takes its children along
    return Host(name, addresses[name], _first_child(process), folder / f"{name}-more")


def _first_child(process: subprocess.Popen[bytes]) -> psutil.Process:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        for child in psutil.Process(process.pid).children():
            if child.name() == "sshd":
                return child
        time.sleep(0.05)
    raise NoHosts("namespaces for networks, names, mounts and processes are not allowed")


def _client(folder: Path, hosts: tuple[Host, ...]) -> dict[str, str]:
    """An ssh that knows the hosts and nothing else."""
    known = "".join(f"Host {h.name}\n  HostName {h.address}\n" for h in hosts)
    common = (
        f"Host *\n  Port 2222\n  IdentityFile {folder}/keys/client\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    (folder / "ssh_config").write_text(known + common)
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    return dict(os.environ) | {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}


def _must(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)


def _try(*words: str) -> None:
    subprocess.run(words, check=False, capture_output=True, timeout=60)
