"""Compares the contrast with torch's cross-entropy over whole logits, as MoCo and InfoXLM compute it. Prints one table:
CPU seconds, extra memory, precision of the gradient. `python benchmarks/contrast.py`

Each case runs in its own process, with one thread. Time: the two implementations alternate, and the ratio is the median
of the ratios of their CPU seconds of forward and backward. Memory: the process' peak resident set minus the one before
the call. Both have the same queue, no gradient for the keys, and temperature 0.05; vectors are normalised. Ours also
masks by three text ids of each item. Error: norm of the gradient's error, relative to autograd in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from infoxlm_ds.losses.contrast import Form, Keys, contrast

TEMPERATURE = 0.05
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--largest", type=int, default=256, help="largest size of cross-entropy's logits, in 2^20 numbers"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, *numbers = json.loads(options.case)
        measures: dict[str, Callable[..., object]] = {"time": _time, "memory": _memory, "precision": _precision}
        print(json.dumps(measures[kind](*numbers)))
        return
    _row("case", "ours", "cross-entropy", "bf16 logits", "fp16 logits", "ratio")
    _row(*("-" * 10,) * 6)
    for n, k, width, noise in ((512, 65536, 256, 0.05), (512, 65536, 256, 5.0), (512, 65536, 768, 0.05)):
        ours, peer, ratio = _run("time", n, k, width, noise)
        state = "trained" if noise < 1 else "untrained"
        _row(f"CPU s, N={n}, K={k}, d={width}, {state}", f"{ours:.2f}", f"{peer:.2f}", "", "", f"{ratio:.2f}")
    for n, k in ((512, 65536), (2048, 131072), (8192, 131072)):
        ours, seconds = _run("memory", "ours", n, k, 256)
        case = f"extra MiB, N={n}, K={k}, d=256 ({seconds:.1f} CPU s)"
        if n * k <= options.largest * 2**20:
            (peer, _) = _run("memory", "peer", n, k, 256)
            _row(case, f"{ours:,.0f}", f"{peer:,.0f}", "", "", f"{ours / peer:.3f}")
        else:
            _row(case, f"{ours:,.0f}", "not run", "", "", "")
    for temperature in (0.2, 0.11, 0.08, 0.049):
        loss, errors = _run("precision", temperature)
        _row(f"error of the gradient at loss {loss:.0e}", *(f"{error:.0e}" for error in errors), "")


def _row(case: str, *cells: str) -> None:
    print(f"| {case:48} | " + " | ".join(f"{cell:>13}" for cell in cells) + " |", flush=True)


def _run(*case: object) -> Any:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


class Inputs(NamedTuple):
    """Pairs, of which the query is the key plus noise, and a queue."""

    query: Tensor
    key: Tensor
    ids: Tensor
    queue: Keys

    def to(self, dtype: torch.dtype) -> Inputs:
        queue = Keys(self.queue.vectors.to(dtype), self.queue.ids)
        return Inputs(self.query.to(dtype), self.key.to(dtype), self.ids, queue)


Way = Callable[..., Tensor]  # an implementation: takes inputs and query, returns the loss


def _inputs(n: int, k: int, width: int, noise: float) -> Inputs:
    g = torch.Generator().manual_seed(0)
    queue, key = (_unit(torch.randn(count, width, generator=g)) for count in (k, n))
    query = _unit(torch.randn(n, width, generator=g).mul_(noise / width**0.5).add_(key))
    ids, older = (torch.randint(2**60, (count, 3), generator=g) for count in (n, k))
    return Inputs(query, key, ids, Keys(queue, older))


def _unit(x: Tensor) -> Tensor:
    for part in x.split(4096):  # in place, so that making the input does not raise the peak
        part /= part.norm(dim=1, keepdim=True)
    return x


def _ours(inputs: Inputs, query: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    form = Form(in_batch=False)
    loss, _ = contrast(query, inputs.key, temperature, form, ids=inputs.ids, queue=inputs.queue, key_gradient=False)
    return loss


def _peer(inputs: Inputs, query: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    positive, negative = (query * inputs.key).sum(1, keepdim=True), query @ inputs.queue.vectors.t()
    logits = torch.cat([positive, negative], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def _seconds(way: Way, inputs: Inputs) -> float:
    start = time.process_time()
    way(inputs, inputs.query.detach().requires_grad_()).backward()
    return time.process_time() - start


def _time(n: int, k: int, width: int, noise: float) -> tuple[float, float, float]:
    torch.set_num_threads(1)
    inputs = _inputs(n, k, width, noise)
    both = [[_seconds(way, inputs) for way in (_ours, _peer)] for _ in range(ROUNDS + 1)][1:]
    ours, peer = (statistics.median(column) for column in zip(*both, strict=True))
    return ours, peer, statistics.median(a / b for a, b in both)


def _memory(who: str, n: int, k: int, width: int) -> tuple[float, float]:
    torch.set_num_threads(1)
    way = _ours if who == "ours" else _peer
    _seconds(way, _inputs(8, 16, width, 0.05))  # at the first call torch allocates memory of its own
    inputs = _inputs(n, k, width, 0.05)
    before = _resident("VmRSS")
    seconds = _seconds(way, inputs)
    return (_resident("VmHWM") - before) / 1024, seconds


def _resident(field: str) -> int:
    """The process' resident set in KiB: now (VmRSS) or its peak (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def _precision(temperature: float) -> tuple[float, list[float]]:
    """Loss, and errors of the gradients relative to autograd in float64 through the loss's definition."""
    inputs = _inputs(64, 16384, 128, 0.05)
    wide = inputs.to(torch.float64)

    def defined(inputs: Inputs, query: Tensor) -> Tensor:
        negative = (query @ inputs.queue.vectors.t() / temperature).logsumexp(1)
        return softplus(negative - (query * inputs.key).sum(1) / temperature, threshold=50).mean()

    exact = _gradient(defined, wide)
    errors = [_error(_gradient(partial(_ours, temperature=temperature), inputs), exact)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        errors.append(_error(_gradient(partial(_peer, temperature=temperature), inputs.to(dtype)), exact))
    return float(defined(wide, wide.query)), errors


def _gradient(way: Way, inputs: Inputs) -> Tensor:
    leaf = inputs.query.detach().requires_grad_()
    way(inputs, leaf).backward()
    assert leaf.grad is not None
    return leaf.grad.double()


def _error(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
