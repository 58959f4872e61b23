"""Compares our whole training step with that of peers on the same items. Prints a table for each case.
`python -m benchmarks.step`

Each implementation has its own process and one thread, and they take their steps in turn. Time: CPU seconds of a step,
median of the rounds; the ratio to ours is the median of the rounds' ratios. Memory: the highest resident memory in a
step, above the process' size before it made its model. All get the same weights, masked pieces, pairs and queue, and
the program fails if a loss of the first step differs by more than 1e-5 of it. Batches are made before the first step.

Our rows: under DeepSpeed, at ZeRO 0 and 1, and on torch alone with a fused AdamW, clipping and an average in place.
Peers: `naive` pads each task and makes whole logits, three backward passes, and runs all layers for the contrast;
`tuned` does not, and its best form counts; `reference` is the algorithm of InfoXLM's code. `benchmarks/peers.py` has
them.

`Limit`: the time that the matrix products of our step would take at the rate that the same process reaches with a
large product, as a share of the step's time. `contrast`: trained keys alone, against sentence-transformers. `ranks`:
two ranks with a lane each against one rank with two lanes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.cases import STRONG, Case, real_tokens, work
from benchmarks.ours import Ours
from benchmarks.peers import NAIVE, REFERENCE, TUNED, Peer
from benchmarks.processes import Answer, Group, Ranks, cpu

SHORT = Case()
BLOCKS = Case(text="blocks-254", tokens=(1024, 256), pairs=4)
XLM_R = 250_002
CASES = {
    "short-16k": SHORT,
    "blocks-16k": BLOCKS,
    "short-250k": replace(SHORT, vocabulary=XLM_R, tokens=(256, 256), pairs=8),
    "blocks-250k": replace(BLOCKS, vocabulary=XLM_R, tokens=(512, 128), pairs=2),
}
CONTRAST = Case(tokens=(0, 0), pairs=128, lanes=2, layers=4, contrast=STRONG | {"same_text": "ignore"})
OURS = "ours, ZeRO 0"  # what a run of one rank in fp32 is told to use
TOLERANCE = 1e-5
BATCHES = 4  # steps whose items differ


class Runner(NamedTuple):
    """Something that makes steps: a process and the name of the method that makes one."""

    ranks: Ranks
    method: str = "step"

    def step(self) -> list[Answer]:
        return self.ranks(self.method)

    def losses(self) -> dict[str, float]:
        found: dict[str, float] = self.ranks("losses")[0].value
        return found


class Row(NamedTuple):
    name: str
    seconds: float
    ratio: float
    peak: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "contrast", "ranks"], action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of a small model")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each case instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    agree = True
    for name in options.case or [*CASES, "contrast", "ranks"]:
        rounds = 1 if options.quick else options.rounds
        case = CONTRAST if name == "contrast" else SHORT if name == "ranks" else CASES[name]
        if options.quick:
            case = replace(case, layers=min(2, case.layers // 3), width=64, heads=2, universal_layer=1)
        measure = {"contrast": _contrast, "ranks": _ranks}.get(name, _steps)
        result = {"case": name} | measure(case, rounds)
        agree &= result.get("differing", 0.0) <= TOLERANCE
        print(json.dumps(result) if options.json else _report(result), flush=True)
    return 0 if agree else 1


def _steps(case: Case, rounds: int) -> dict[str, Any]:
    """The whole step of all implementations."""
    prepared, stage_1 = work(replace(case, stage=0), BATCHES), work(case, BATCHES)
    with Group() as group:
        ours = group.start(partial(Ours, prepared))
        runners = {OURS: Runner(ours)}
        runners["ours, ZeRO 1"] = Runner(group.start(partial(Ours, stage_1)))
        runners["ours, torch alone"] = Runner(group.start(partial(Ours, prepared, plain=True)))
        for name, way in (("naive", NAIVE), ("reference", REFERENCE)):
            runners[name] = Runner(group.start(partial(Peer, prepared, {"step": way})))
        tuned = group.start(partial(Peer, prepared, {str(i): way for i, way in enumerate(TUNED)}))
        for i, way in enumerate(TUNED):
            backward = "one backward" if way.one_backward else "three backwards"
            runners[f"tuned, {way.buckets} bucket{'s' * (way.buckets > 1)}, {backward}"] = Runner(tuned, str(i))
        differing = _compare_losses(runners)
        rows = _alternate(runners, rounds)
        limit = _limit(ours, rounds)
    return {
        "tokens": real_tokens(prepared),
        "differing": differing,
        "rows": [row._asdict() for row in rows],
    } | limit


def _limit(ours: Ranks, rounds: int) -> dict[str, float]:
    """Operations of a step, the rate of a large product, and the median of the rounds' shares of products."""
    operations, rates, shares = ours("operations")[0].value, [], []
    for _ in range(rounds):
        seconds = cpu(ours("step"))
        rates.append(ours("rate")[0].value)
        shares.append(operations / rates[-1] / seconds)
    return {"operations": operations, "rate": statistics.median(rates), "limit": statistics.median(shares)}


def _compare_losses(runners: dict[str, Runner]) -> float:
    """Make step 1 with all. Returns the largest relative difference of a loss to ours."""
    differing, expected = 0.0, None
    for runner in runners.values():
        if runner.method != "step":
            runner.ranks("restart")
        runner.step()
        losses = runner.losses()
        expected = expected or losses
        differing = max(differing, *(abs(losses[task] / loss - 1) for task, loss in expected.items()))
    return differing


def _alternate(runners: dict[str, Runner], rounds: int) -> list[Row]:
    """All step in turn; the first round is not counted. Ratios are to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    peaks = dict.fromkeys(runners, 0.0)
    for _ in range(rounds + 1):
        for name, runner in runners.items():
            answers = runner.step()
            seconds[name].append(cpu(answers))
            peaks[name] = sum(answer.peak for answer in answers)
            runner.losses()
    first = next(iter(seconds.values()))[1:]
    return [Row(name, statistics.median(s[1:]), median_ratio(s[1:], first), peaks[name]) for name, s in seconds.items()]


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def _contrast(case: Case, rounds: int) -> dict[str, Any]:
    """The contrast alone with trained keys, against sentence-transformers."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return {"note": "sentence-transformers is not installed: pip install 'infoxlm-ds[benchmarks]'"}
    from benchmarks.sentences import SentenceTransformers

    prepared = work(case, BATCHES)
    with Group() as group:
        runners = {OURS: Runner(group.start(partial(Ours, prepared)))}
        for size, by_length in ((32, False), (128, False), (32, True)):
            name = f"sentence-transformers, cached, mini-batches of {size}{', sorted by length' * by_length}"
            runners[name] = Runner(group.start(partial(SentenceTransformers, prepared, size, by_length)))
        differing = _compare_losses(runners)
        rows = _alternate(runners, rounds)
    return {"tokens": real_tokens(prepared), "differing": differing, "rows": [row._asdict() for row in rows]}


def _ranks(case: Case, rounds: int) -> dict[str, Any]:
    """The same two lanes on one rank and on two."""
    prepared = work(replace(case, lanes=2), BATCHES)
    with Group() as group:
        runners = {
            name: Runner(group.start(partial(Ours, prepared), world)) for name, world in (("1 rank", 1), ("2 ranks", 2))
        }
        rows = _alternate(runners, rounds)
    return {"tokens": real_tokens(prepared), "rows": [row._asdict() for row in rows]}


def _report(result: dict[str, Any]) -> str:
    lines = [f"\n### {result['case']}", ""]
    if "note" in result:
        return "\n".join([*lines, result["note"]])
    rows = [Row(**row) for row in result["rows"]]
    lines += [f"{result['tokens']:,.0f} real tokens a step.", ""]
    lines += ["| implementation | CPU s | ratio | peak MiB |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.seconds:.3f} | {row.ratio:.2f} | {row.peak:,.0f} |" for row in rows]
    lines.append("")
    named = {row.name: row for row in rows}
    if "limit" in result:
        tuned = min((row for row in rows if row.name.startswith("tuned")), key=lambda row: row.ratio)
        cost = 1 / named["ours, torch alone"].ratio - 1
        lines += [
            f"Best tuned form: {tuned.ratio:.2f} ({tuned.name}). DeepSpeed costs {cost:+.1%} over torch alone.",
            f"Limit: {result['operations'] / 1e9:.1f} G operations at {result['rate'] / 1e9:.0f} G a CPU second are "
            f"{result['limit']:.0%} of the step.",
        ]
    if "differing" in result:
        lines.append(f"Losses of step 1 differ by at most {result['differing']:.1e} of their size.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
