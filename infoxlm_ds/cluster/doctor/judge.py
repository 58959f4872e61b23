"""Pure functions that turn the hosts' facts into findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from infoxlm_ds.cluster.doctor.agent import Facts, Gpu
from infoxlm_ds.cluster.doctor.findings import Finding, failure, ok, warning

SKEW = 2.0  # seconds; above this, times of files and logs of several hosts are hard to compare
LOCK_AGE = 600  # seconds that a build of an extension may take
SLOW = 0.5  # of the median bandwidth
LITTLE = 100e6  # bytes a second, less than 1 Gbit/s Ethernet gives
FEW = 28  # up to so many pairs (8 hosts), each gets a line even if all is well
GB = 1e9


def code(facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Whether all hosts have the same source files and the same Python."""
    sources = odd_ones({host: tuple(sorted(f.code.items())) for host, f in facts.items()})
    for host, (mine, common) in sources.items():
        differing = sorted({name for name, _ in set(mine) ^ set(common)})
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        yield failure("code", f"{host} has another {differing[0]}{more}", "check out the same commit on every host")
    versions = odd_ones({host: f.python for host, f in facts.items()})
    for host, (own, usual) in versions.items():
        yield failure("code", f"{host} has Python {own}, others {usual}", "use the same interpreter on every host")
    if not sources and not versions:
        first = next(iter(facts.values()))
        yield ok("code", f"the same {len(first.code)} files on Python {first.python}{everywhere(facts)}")


def packages(facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Whether all hosts have the required packages, in the same versions."""
    remedy = "install requirements.lock there (`make install`; without a network, `make wheelhouse`)"
    bad = set()
    for host, of_host in facts.items():
        for wrong in of_host.wrong:
            bad.add(host)
            yield failure("packages", f"{host}: {wrong}", remedy)
    for host, (own, usual) in odd_ones({h: tuple(sorted(f.packages.items())) for h, f in facts.items()}).items():
        differing = [f"{name} {dict(own)[name]} ({v} elsewhere)" for name, v in usual if dict(own).get(name, v) != v]
        if differing and host not in bad:
            bad.add(host)
            yield failure("packages", f"{host} has {', '.join(differing)}", remedy)
    for host, of_host in facts.items():
        if of_host.gpus and of_host.packages.get("torch", "").endswith("+cpu"):
            bad.add(host)
            yield failure("packages", f"{host} has GPUs and a torch without CUDA", "install torch from PyPI there")
    if not bad:
        first = next(iter(facts.values()))
        main = ", ".join(f"{name} {first.packages[name]}" for name in ("torch", "deepspeed", "transformers"))
        yield ok("packages", f"{main} and {len(first.packages) - 3} more{everywhere(facts)}")


def devices(facts: Mapping[str, Facts], slots: Mapping[str, int]) -> Iterator[Finding]:
    """Whether each host has enough GPUs for its slots, all of one kind; if no host has a GPU, enough cores."""
    with_gpus = [host for host, of_host in facts.items() if of_host.gpus]
    bad = False
    for host, of_host in facts.items():
        wanted = slots.get(host, 0)
        if with_gpus and (wanted or 1) > len(of_host.gpus):
            bad = True
            yield failure(
                "devices", f"{host} has {len(of_host.gpus)} GPUs, {wanted or 1} wanted", _slots(len(of_host.gpus))
            )
        elif with_gpus and 0 < wanted < len(of_host.gpus):
            bad = True
            idle = f"{host} has {len(of_host.gpus)} GPUs, and {wanted} slots"
            yield warning("devices", f"{idle}: some stay idle", _slots(len(of_host.gpus)))
        elif not with_gpus and wanted > of_host.cores:
            bad = True
            yield warning("devices", f"{host} has {of_host.cores} cores for {wanted} CPU ranks", _slots(of_host.cores))
        for number, gpu in enumerate(of_host.gpus):
            if gpu.used > 0.05 * gpu.memory:
                bad = True
                busy = f"GPU {number} of {host} has {gpu.used / GB:.1f} of {gpu.memory / GB:.0f} GB in use"
                yield warning("devices", busy, f"stop the program that uses it: `nvidia-smi` on {host} names it")
    kinds = {host: _kind(facts[host].gpus[0]) for host in with_gpus}
    for host, (own, usual) in odd_ones(kinds).items():
        bad = True
        yield warning("devices", f"{host} has {own}; others {usual}", "the slowest rank sets the pace: use one kind")
    if not bad:
        gpus, cores = Counter(g.name for f in facts.values() for g in f.gpus), sum(f.cores for f in facts.values())
        names = ", ".join(f"{n} {name}" for name, n in gpus.items())
        yield ok("devices", names or f"no GPU, {cores} cores")


def locks(facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Whether a lock of an extension build is left."""
    ages = [(host, path, age) for host, of_host in facts.items() for path, age in of_host.locks.items()]
    for host, path, age in ages:
        if age > LOCK_AGE:
            what = f"{host}: {path} is {age / 60:.0f} minutes old: its build was killed, and every run waits for it"
            yield failure("JIT lock", what, f"rm {path}")
        else:
            yield warning("JIT lock", f"{host}: {path}: an extension is being built", "wait for it, or remove the lock")
    if not ages:
        yield ok("JIT lock", "no lock of an extension build")


def clocks(ahead: Mapping[str, float]) -> Iterator[Finding]:
    """Whether the clocks agree. `ahead`: seconds by which each host's clock is ahead of this one's."""
    middle = median(ahead.values())
    wrong = {host: seconds - middle for host, seconds in ahead.items() if abs(seconds - middle) > SKEW}
    for host, seconds in wrong.items():
        way = "ahead" if seconds > 0 else "behind"
        yield failure("clock", f"{host} is {abs(seconds):.0f} seconds {way}", "synchronise the clocks (chrony or NTP)")
    if not wrong:
        yield ok("clock", f"within {max(abs(s - middle) for s in ahead.values()):.2f} seconds{everywhere(ahead)}")


def network(pairs: Mapping[tuple[str, str], Any], sent: float | None) -> Iterator[Finding]:
    """Latency and bandwidth of the pairs of hosts. `pairs`: the result of `exchange`, or why it failed; `sent`: bytes
    that a rank sends in a step."""
    connected = {pair: measured for pair, measured in pairs.items() if isinstance(measured, dict)}
    for pair, measured in pairs.items():
        if pair not in connected:
            remedy = (
                "open all ports between the hosts; set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME if there are several"
            )
            yield failure("network", f"{' and '.join(pair)} cannot connect: {str(measured).splitlines()[0]}", remedy)
    if not connected:
        return
    usual = median(measured["bandwidth"] for measured in connected.values())
    for pair, measured in connected.items():
        speed = measured["bandwidth"]
        what = f"{' and '.join(pair)}: all-reduce {measured['latency'] * 1e6:,.0f} µs, {speed / 1e6:,.0f} MB/s"
        if speed < max(SLOW * usual, LITTLE):
            remedy = "check cables, switch ports, the interface in use, and other traffic"
            yield warning("network", f"{what}, {usual / 1e6:,.0f} in the median", remedy)
        elif len(connected) <= FEW:
            yield ok("network", what)
    slowest = min(measured["bandwidth"] for measured in connected.values())
    step = f": the {sent / GB:.2f} GB that a rank sends in a step take {sent / slowest:.1f} s" if sent else ""
    yield ok("network", f"{len(connected)} pairs connected, {slowest / 1e6:,.0f} MB/s at least{step}")


def odd_ones(values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The hosts whose value is not the most frequent one, with their value and the most frequent one."""
    if not values:
        return {}
    usual = Counter(values.values()).most_common(1)[0][0]
    return {host: (value, usual) for host, value in values.items() if value != usual}


def everywhere(hosts: Mapping[str, Any]) -> str:
    """The words `on N hosts`, if there are several."""
    return f" on {len(hosts)} hosts" if len(hosts) > 1 else ""


def _kind(gpu: Gpu) -> str:
    return f"{gpu.name}, {gpu.memory / GB:.0f} GB, driver {gpu.driver}"


def _slots(number: int) -> str:
    return f"set slots={number} in the hostfile"
