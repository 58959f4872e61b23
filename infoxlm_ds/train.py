"""The program that the DeepSpeed launcher runs: `deepspeed infoxlm_ds/train.py recipes/demo.yaml [key.path=value ...]`.

It parses, joins the other ranks, builds, fits and closes.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

from infoxlm_ds import dist, reporting, trainer
from infoxlm_ds.build import Inputs, agreed_inputs, build, summary
from infoxlm_ds.cluster.environment import follow_launcher
from infoxlm_ds.config import UserError
from infoxlm_ds.engine.ranks import NotJoined, start_ranks
from infoxlm_ds.monitor import failures
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.reading import load_recipe
from infoxlm_ds.state import TrainState
from infoxlm_ds.trouble import complain

STOPPED_ON_REQUEST = 75  # EX_TEMPFAIL: run the same command again to go on


def main(arguments: list[str] | None = None) -> int:
    """Run one rank. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_args(arguments)
    _quieten()
    for number in (signal.SIGINT, signal.SIGTERM):  # until there is a state to save
        signal.signal(number, lambda number, frame: os._exit(STOPPED_ON_REQUEST))
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        follow_launcher()
        start_ranks(recipe.timeout, recipe.memory.deterministic)
        inputs = agreed_inputs(recipe)
        if dist.from_first_rank(inputs.finished):
            return 0
        inputs.checkpoints.lock()
    except UserError as error:
        return _mistake(error)
    except NotJoined as error:
        return _mistake(error, code=1)
    return build_and_fit(inputs)


def build_and_fit(inputs: Inputs) -> int:
    """Build the state and train. After an error, every rank ends and the cause is reported. Returns the exit code."""
    run, store = inputs.identity.recipe.run, inputs.checkpoints.store
    if dist.rank() == 0:
        failures.forget(run)
    where = dist.gather_objects(failures.here())
    try:
        try:
            state = build(inputs)
        except UserError as error:
            return _mistake(error)
        return fit_and_close(state)
    except Exception as error:
        return failures.end(error, run, where, store.advice())
    finally:
        inputs.loader.close()


def fit_and_close(state: TrainState) -> int:
    """Train, with rank 0's outputs open. Returns the exit code."""
    run, steps = state.recipe.run, state.recipe.optimizer.steps
    with (
        nullcontext()
        if dist.rank()
        else Sinks(run, state.step, steps, state.recipe.log, reporting.watchdogs(state)) as sinks
    ):
        if sinks is not None:
            reporting.begin(state, sinks)
        reporting.say(sinks, summary(state))
        started = time.monotonic()
        done = trainer.fit(state, sinks)
        if sinks is not None:
            reporting.end(state, sinks, done, time.monotonic() - started)
    return 0 if done else STOPPED_ON_REQUEST


def _quieten() -> None:
    """Hide DeepSpeed's start-up messages and its announcements of renames. They do not concern the user."""
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    ours = ("OVERFLOW!", "MPU is not provided")  # we report overflows; the second is no error
    log.addFilter(lambda record: not any(words in record.getMessage() for words in ours))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _mistake(error: Exception, code: int = 2) -> int:
    """Print the error on rank 0. If the ranks have not joined yet, print it on the first rank of
    each host. Returns `code`."""
    if (dist.rank() if dist.active() else dist.local_rank()) == 0:
        complain(str(error))
    return code


if __name__ == "__main__":
    sys.exit(main())
