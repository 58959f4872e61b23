"""What a run's figures cost: `python -m benchmarks.monitor`.

Trains the demo's recipe on one rank, with TensorBoard and metrics.csv, and adds up the CPU seconds that go to counting,
logging, pictures and TensorBoard's thread. Prints them for each step and as a share of all CPU seconds of training.
Retrieval itself, which `probe.every` spaces, is counted apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from infoxlm_ds import reporting, trainer
from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.monitor.probe import RetrievalProbe
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.reading import load_recipe


class Clock:
    """CPU seconds of this thread in functions, by name. What a function calls that is timed too is its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    def wrap(self, owner: Any, function: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner, started = self._inner, 0.0, time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.thread_time() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
                self._inner = outer + spent

        setattr(owner, function, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="of `infoxlm demo`")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args()
    clock = Clock()
    clock.wrap(reporting, "count", "counting")
    clock.wrap(reporting, "log", "logging")
    clock.wrap(RetrievalProbe, "run", "retrieval")
    clock.wrap(RetrievalProbe, "_pictures", "pictures")
    for name in ("write", "picture", "histogram"):
        clock.wrap(Sinks, name, "writing")
    with tempfile.TemporaryDirectory(prefix="infoxlm-") as folder:
        values = {"run": f"{folder}/run", "corpus": options.corpus, "optimizer.steps": options.steps, "log.csv": "true"}
        overrides = [f"{key}={value}" for key, value in values.items()]
        total, writer = _train(load_recipe(Path("demo"), [*overrides, *options.overrides]))
    _print(clock.seconds | {"TensorBoard's thread": writer}, total, options.steps)


def _train(recipe: Any) -> tuple[float, float]:
    """CPU seconds of training and, of them, those of TensorBoard's thread."""
    start_ranks()
    inputs = agreed_inputs(recipe)
    state = build(inputs)
    others = {thread.id for thread in psutil.Process().threads()}
    started = time.process_time()
    with Sinks(recipe.run, 0, recipe.optimizer.steps, recipe.log) as sinks:
        new = [thread.id for thread in psutil.Process().threads() if thread.id not in others]
        reporting.begin(state, sinks)
        trainer.fit(state, sinks)
        total = time.process_time() - started
        writer = sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in new)
    inputs.loader.close()
    return total, writer


def _print(seconds: dict[str, float], total: float, steps: int) -> None:
    table = Table("", "CPU ms a step", "share of training")
    for name, spent in seconds.items():
        table.add_row(name, f"{1000 * spent / steps:.2f}", f"{spent / total:.2%}")
    ours = sum(spent for name, spent in seconds.items() if name != "retrieval")
    table.add_row("all but retrieval", f"{1000 * ours / steps:.2f}", f"{ours / total:.2%}")
    table.add_row("training", f"{1000 * total / steps:.1f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
