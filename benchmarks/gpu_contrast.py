"""The contrast alone, at a size whose matrix of logits would not fit into memory."""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn.functional import normalize

from benchmarks.gpu_report import Part
from infoxlm_ds.losses.contrast import Form, Keys, contrast

PAIRS, QUEUE, WIDTH, REPEATS = 32_768, 131_072, 768, 3


def write(part: Part, name: str) -> None:
    pairs, keys, width = (64, 256, 32) if part.tiny else (PAIRS, QUEUE, WIDTH)
    with part.section(f"The contrast alone: {pairs:,} pairs against {keys:,} queued keys, width {width}"):
        _measure(part, pairs, keys, width)


def _measure(part: Part, pairs: int, queue: int, width: int) -> None:
    """In one direction with the step's other pairs, in fp32; the forward pass computes the gradients too."""
    generator = torch.Generator(part.device).manual_seed(0)

    def rows(count: int) -> torch.Tensor:
        return normalize(torch.randn(count, width, device=part.device, generator=generator), dim=1)

    query, key = rows(pairs).requires_grad_(), rows(pairs).requires_grad_()
    ids = torch.randint(2**60, (pairs + queue, 1))
    older = Keys(rows(queue), ids[pairs:])
    forward, backward = [], []
    part.free()
    before = part.peak()
    for _ in range(1 + REPEATS):  # the first is not counted
        query.grad = key.grad = None
        started = _now(part)
        loss, _ = contrast(query, key, 0.05, Form(), ids=ids[:pairs], queue=older)
        middle = _now(part)
        loss.backward()
        forward.append(middle - started)
        backward.append(_now(part) - middle)
    assert query.grad is not None and torch.isfinite(query.grad).all()
    operations = 4.0 * width * pairs * (queue + 2 * pairs)  # logits and mean keys; for the pairs' keys, once more
    taken = statistics.median(forward[1:])
    rate, logits = operations / taken, 4 * pairs * (queue + pairs)
    part.table(
        ("", ""),
        [
            ("forward, with the gradients: ms", f"{1000 * taken:.1f}"),
            ("backward: ms", f"{1000 * statistics.median(backward[1:]):.2f}"),
            ("operations a second, in fp32", f"{rate / 1e12:.1f} T"),
            ("peak of memory above the inputs, GiB", f"{part.peak() - before:.2f}"),
            ("whole matrix of logits, GiB", f"{logits / 2**30:.2f}"),
        ],
    )


def _now(part: Part) -> float:
    part.synchronise()
    return time.perf_counter()
