"""The doctor's judgements about cases that two namespaces of one machine cannot show."""

from __future__ import annotations

from dataclasses import replace

from infoxlm_ds.cluster.doctor import agent, judge
from infoxlm_ds.cluster.doctor.agent import Facts, Gpu

HERE = Facts(**agent.facts())


def test_another_python_is_named() -> None:
    (found,) = judge.code({"a": HERE, "b": HERE, "c": replace(HERE, python="3.12.1")})
    assert found.level == "failure" and found.what.startswith("c has Python 3.12.1, others ")


def test_another_kind_of_gpu_and_idle_ones_are_named() -> None:
    one, other = Gpu("H100", "580", 80 * 10**9, 0), Gpu("A100", "580", 40 * 10**9, 0)
    hosts = {"a": replace(HERE, gpus=[one]), "b": replace(HERE, gpus=[one, one]), "c": replace(HERE, gpus=[other])}
    said = [found.what for found in judge.devices(hosts, {"a": 1, "b": 1, "c": 1})]
    assert said == [
        "b has 2 GPUs, and 1 slots: some stay idle",
        "c has A100, 40 GB, driver 580; others H100, 80 GB, driver 580",
    ]
    (found,) = judge.devices({"a": hosts["a"], "b": hosts["b"]}, {"a": 1, "b": 2})
    assert found.level == "ok" and found.what == "3 H100"


def test_the_slow_pair_among_many_is_named() -> None:
    fast, slow = {"latency": 1e-4, "bandwidth": 10e9}, {"latency": 1e-4, "bandwidth": 4e9}
    pairs = {("a", "b"): fast, ("a", "c"): fast, ("b", "c"): slow}
    *each, found = judge.network(pairs, sent=8e9)
    assert [one.level for one in each] == ["ok", "ok", "warning"]
    assert each[2].what == "b and c: all-reduce 100 µs, 4,000 MB/s, 10,000 in the median"
    assert found.what == "3 pairs connected, 4,000 MB/s at least: the 8.00 GB that a rank sends in a step take 2.0 s"
