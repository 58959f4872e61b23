"""Compares the training of the working tree with that of another revision, bit by bit: `make same REV=d79e331`.

Each tree trains the same recipes through the launcher, with its own code, and writes its final weights as safetensors.
Then every loss and every weight is compared. A refactoring shows no difference. A change that is meant to change
numbers shows which ones change.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from infoxlm_ds.cluster.hosts import free_port_here

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "demo.yaml"
# The demo as it is, which has trained keys (keys with a gradient), and with InfoXLM's momentum keys and queue.
# Older revisions know an engine configuration by its path only.
ENGINE = f"engine={ROOT / 'ds_configs' / 'zero1_fp32.json'}"
DEMO_FORMS = {"demo": (ENGINE,), "demo-infoxlm": (ENGINE, "preset=infoxlm", "contrast.queue.size=4096")}
# Scalars that depend on the clock or on the machine's memory.
NOT_COMPARED = re.compile(r"(speed|memory|checkpoint)/.*|seconds|slowest")


@dataclass(frozen=True)
class Result:
    """The scalars of each step of a run, and the weights at its end."""

    metrics: dict[int, dict[str, float]]
    weights: dict[str, torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="a git revision to compare the working tree with")
    parser.add_argument("--recipe", type=Path, help="default: the demo, with trained keys and with momentum keys")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args()
    tree = _worktree(options.revision)
    recipe = options.recipe or DEMO
    forms: dict[str, tuple[str, ...]] = DEMO_FORMS if options.recipe is None else {recipe.stem: ()}
    lengths = (f"optimizer.steps={options.steps}", f"optimizer.warmup={options.steps // 4}")
    every = (f"checkpoint.every={options.steps}", "log.every=1", "log.tensorboard=false", "probe=null")
    equal = True
    for name, form in forms.items():
        for ranks in options.ranks:
            overrides = (*form, *lengths, *every, *options.overrides)
            then, now = (_train(where, recipe, ranks, overrides) for where in (tree, ROOT))
            differences = list(_differences(then, now))
            equal &= not differences
            print(f"{name}, {ranks} rank(s), {options.steps} steps: {len(now.weights)} tensors", end=", ")
            print("bit-equal" if not differences else "DIFFERENT", *differences, sep="\n  ", flush=True)
    return 0 if equal else 1


def _worktree(revision: str) -> Path:
    """A checkout of a revision under `build/`, which git ignores."""
    named = ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"]
    commit = subprocess.run(named, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    tree = ROOT / "build" / "same" / commit[:12]
    if not tree.is_dir():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", tree, commit], cwd=ROOT, check=True)
    return tree


def _train(tree: Path, recipe: Path, ranks: int, overrides: tuple[str, ...]) -> Result:
    """Train from scratch with the code of a tree."""
    run = ROOT / "build" / "same" / "run"
    weights = run.with_name("weights")
    for old in (run, weights):
        shutil.rmtree(old, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    program = Path(sys.executable).with_name("deepspeed")
    command: list[str | Path] = [program, "--num_accelerators", str(ranks), "--master_port", str(free_port_here())]
    command += [tree / "infoxlm_ds" / "train.py", recipe, f"run={run}", *overrides]
    _run(command, environment)
    cli = [sys.executable, "-c", "from infoxlm_ds.cli import main; main()"]
    _run([*cli, "checkpoint", "consolidate", run, weights], environment)
    metrics: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step = metrics.setdefault(values.pop("step"), {})
        step |= {name: value for name, value in values.items() if not NOT_COMPARED.fullmatch(name)}
    tensors = {
        f"{file.stem}.{name}": x for file in weights.glob("*.safetensors") for name, x in load_file(file).items()
    }
    return Result(metrics, tensors)


def _run(command: list[str | Path], environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr[-4000:]}\nfailed: {' '.join(map(str, command))}")


def _differences(then: Result, now: Result) -> Iterator[str]:
    """One line for each scalar and each tensor that differs."""
    steps = then.metrics.keys() | now.metrics.keys()
    of_step = {step: (then.metrics.get(step, {}), now.metrics.get(step, {})) for step in sorted(steps)}
    for name in sorted({name for both in of_step.values() for scalars in both for name in scalars}):
        pairs = {step: (before.get(name), after.get(name)) for step, (before, after) in of_step.items()}
        differing = {step: pair for step, pair in pairs.items() if pair[0] != pair[1]}
        if differing:
            step, (before, after) = next(iter(differing.items()))
            yield f"{name}: at {len(differing)} of {len(pairs)} steps, first at step {step}: {before} -> {after}"
    for name in sorted(then.weights.keys() | now.weights.keys()):
        x, y = then.weights.get(name), now.weights.get(name)
        if x is None or y is None:
            yield f"{name}: only {'now' if x is None else 'then'}"
        elif not torch.equal(x, y):
            yield f"{name}: apart by {float((x - y).abs().max()):.1e} of {float(x.abs().max()):.1e}"


if __name__ == "__main__":
    sys.exit(main())
