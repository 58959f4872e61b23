"""Shows how our step grows with its sizes: real tokens a CPU second, keys included. Prints a table and draws
`docs/performance/growth.svg`. `python -m benchmarks.growth`

One size changes at a time. The others are those of the benchmark of a step: 6 layers of width 384, 16,000 pieces, short
text, 512 + 512 tokens and 16 pairs a lane, a queue of 4,096, one lane, one rank, ZeRO 1. `length` trains the masked LM
of full blocks alone, 2,048 tokens. `ranks` divides four lanes among ranks; a rank more than this process may use cores
is marked. Each size has processes of its own; the sizes of a panel take their steps in turn, and the median counts. CPU
seconds are those of all ranks together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import ROOT, Case, real_tokens, work
from benchmarks.ours import Ours
from benchmarks.processes import Group, cpu

BASE = Case()
FIGURE = ROOT / "docs" / "performance" / "growth.svg"


class Size(NamedTuple):
    label: str
    case: Case
    ranks: int = 1


class Point(NamedTuple):
    panel: str
    label: str
    tokens: float  # a CPU second
    seconds: float  # of a step
    peak: float  # MiB of all ranks above their size at the start


def sizes() -> dict[str, list[Size]]:
    """The sizes of each panel."""
    cores = len(os.sched_getaffinity(0))
    blocks = {n: replace(BASE, text=f"blocks-{n - 2}", tokens=(2048, 0), pairs=0) for n in (32, 64, 128, 256, 512)}
    return {
        "tokens a lane": [
            Size(f"{n:,}", replace(BASE, tokens=(n // 2, n // 2), pairs=n // 64)) for n in (256, 512, 1024, 2048, 4096)
        ],
        "length of a sequence": [Size(str(n), case) for n, case in blocks.items()],
        "layers": [Size(str(n), replace(BASE, layers=n, universal_layer=2 * n // 3)) for n in (3, 6, 12)],
        "vocabulary": [
            Size(f"{n // 1000}k", replace(BASE, vocabulary=n)) for n in (16_000, 32_000, 64_000, 128_000, 250_002)
        ],
        "keys in the queue": [
            Size(f"{n // 1024}k", replace(BASE, queue=n)) for n in (2**12, 2**14, 2**16, 2**18, 2**20)
        ],
        "lanes on one rank": [Size(str(n), replace(BASE, lanes=n)) for n in (1, 2, 4, 8)],
        "ranks": [Size(str(n) + "*" * (n > cores), replace(BASE, lanes=4), n) for n in (1, 2, 4)],
    }


def measure(panel: str, of_panel: list[Size], rounds: int) -> list[Point]:
    with Group() as group:
        running, seconds, peaks, tokens = [], [], [], []
        for size in of_panel:
            prepared = work(size.case, 2)
            tokens.append(real_tokens(prepared))
            running.append(group.start(partial(Ours, prepared), size.ranks))
            seconds.append([0.0] * (rounds + 1))
            peaks.append(0.0)
        for done in range(rounds + 1):
            for i, ranks in enumerate(running):
                answers = ranks("step")
                seconds[i][done] = cpu(answers)
                peaks[i] = sum(answer.peak for answer in answers)
    medians = [statistics.median(of_size[1:]) for of_size in seconds]
    return [
        Point(panel, size.label, count / each, each, peak)
        for size, count, each, peak in zip(of_panel, tokens, medians, peaks, strict=True)
    ]


def draw(points: list[Point], path: Path) -> None:
    """One panel for each size that changes, with the same vertical scale."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "growth", "svg.fonttype": "none"}  # the same points give the same file
    panels = list(dict.fromkeys(point.panel for point in points))
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), sharey=True, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        of_panel = [point for point in points if point.panel == panel]
        axis.plot([point.label for point in of_panel], [point.tokens for point in of_panel], marker="o")
        axis.set(xlabel=panel, ylim=(0, None))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("real tokens a CPU second")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", choices=list(sizes()), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of a small model")
    parser.add_argument("--json", type=Path, help="write the points here too")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    points: list[Point] = []
    print("| | | tokens a CPU s | CPU s a step | peak MiB |\n|---|---|---|---|---|")
    for panel, of_panel in sizes().items():
        if options.panel and panel not in options.panel:
            continue
        if options.quick:
            of_panel = [size._replace(case=replace(size.case, width=64, heads=2)) for size in of_panel[:2]]
        for point in measure(panel, of_panel, 1 if options.quick else options.rounds):
            points.append(point)
            print(
                f"| {panel} | {point.label} | {point.tokens:,.0f} | {point.seconds:.2f} | {point.peak:,.0f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([point._asdict() for point in points]))
    draw(points, options.figure)


if __name__ == "__main__":
    main()
