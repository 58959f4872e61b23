"""What the DeepSpeed launcher runs: `deepspeed infoxlm_ds/train.py recipes/demo.yaml [key.path=value ...]`."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch
import typer
from rich.console import Console

from infoxlm_ds import dist, trainer
from infoxlm_ds.checkpoint.checkpoints import Checkpoints
from infoxlm_ds.checkpoint.identity import Identity
from infoxlm_ds.checkpoint.store import Store
from infoxlm_ds.checkpoint.tools import read_through
from infoxlm_ds.config import Recipe, UserError, load_recipe
from infoxlm_ds.data.batch import N_TEXTS, longest_sequence
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.data.reader import Corpus
from infoxlm_ds.engine import Engine, start_ranks
from infoxlm_ds.engine_config import load_engine_config, precision_of
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.model.pretrained import build_model, check_fit
from infoxlm_ds.model.queue import KeyQueue
from infoxlm_ds.monitor import failures
from infoxlm_ds.monitor.probe import RetrievalProbe
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.objective import Objective
from infoxlm_ds.trainer import TrainState

STOPPED_ON_REQUEST = 75  # EX_TEMPFAIL: run the same command again to go on


def main(arguments: list[str] | None = None) -> int:
    """Build, fit, close: one rank. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_args(arguments)
    # DeepSpeed's start-up chatter and announcements of renames are not the user's.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    said_better = ("OVERFLOW!", "MPU is not provided")  # by us; a universal checkpoint needs none
    logging.getLogger("DeepSpeed").addFilter(lambda record: not any(x in record.getMessage() for x in said_better))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for number in (signal.SIGINT, signal.SIGTERM):  # until there is something to save
        signal.signal(number, lambda number, frame: os._exit(STOPPED_ON_REQUEST))
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        start_ranks(recipe.timeout.start)
        inputs = check_inputs(recipe, dist.rank(), dist.world_size())
        if inputs.finished:
            return 0
        inputs.checkpoints.lock()
    except UserError as error:
        return _mistake(error)
    return _run(inputs)


def _run(inputs: Inputs) -> int:
    """Build and fit; whatever ends it, every rank ends and its cause is told."""
    run, store = inputs.identity.recipe.run, inputs.checkpoints.store
    if dist.rank() == 0:
        failures.forget(run)
    where = [str(place) for place in dist.gather_objects(failures.place())]
    try:
        try:
            state = build(inputs)
        except UserError as error:
            return _mistake(error)
        return _fit(state)
    except Exception as error:
        newest = store.latest()
        last = f"The newest checkpoint is {newest.name}" if newest else "There is no checkpoint yet"
        return failures.end(error, run, where, f"{last}: run the same command again to go on")
    finally:
        inputs.loader.close()


def _fit(state: TrainState) -> int:
    recipe = state.recipe
    outputs = (
        nullcontext() if dist.rank() else Sinks(recipe.run, state.step, recipe.optimizer.steps, recipe.log.tensorboard)
    )
    with outputs as sinks:
        if sinks is not None:
            sinks.say(_summary(state))
        done = trainer.fit(state, sinks)
        if sinks is not None and not done:
            sinks.say(f"stopped on request at step {state.step}, saved: run the same command again to go on")
    return 0 if done else STOPPED_ON_REQUEST


def _mistake(error: UserError) -> int:
    """The same on every rank."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"infoxlm: {error}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, read and found to fit together."""

    identity: Identity
    corpus: Corpus
    loader: Loader
    checkpoints: Checkpoints
    finished: bool  # the newest checkpoint is of the recipe's last step
    probe: RetrievalProbe | None


def check_inputs(recipe: Recipe, rank: int, world: int) -> Inputs:
    """Read all that the recipe names, for one of `world` ranks. UserError for the first thing that is missing or does
    not fit; nothing is written."""
    engine_config = load_engine_config(recipe.engine)
    corpus = Corpus(recipe.corpus)
    tokenizer = recipe.corpus / "tokenizer"
    check_fit(recipe.model, tokenizer, longest_sequence(recipe, corpus))
    loader = Loader(recipe, corpus, rank, world)
    checkpoints = Checkpoints(recipe)
    hashes = {file.name: file.sha256 for file in corpus.manifest.tokenizer.files}
    identity = Identity(recipe, engine_config, corpus.manifest.sha256, hashes)
    finished = checkpoints.check(identity)
    longest = corpus.manifest.max_tokens + corpus.manifest.tokenizer.overhead(1)
    probe = RetrievalProbe(recipe.probe, tokenizer, longest) if recipe.probe else None
    if finished and rank == 0:
        print(f"{recipe.run}: finished at step {recipe.optimizer.steps}, nothing to do")
    return Inputs(identity, corpus, loader, checkpoints, finished, probe)


def build(inputs: Inputs) -> TrainState:
    """Everything `fit` needs, from scratch or from the run's newest checkpoint. Collective."""
    recipe = inputs.identity.recipe
    found = inputs.checkpoints.find(inputs.identity)
    tokenizer = inputs.corpus.manifest.tokenizer
    vocabulary = tokenizer.vocab_size
    model = build_model(recipe.model, vocabulary, recipe.seed, tokenizer.special_ids)
    if recipe.memory.activation_checkpointing:  # ZeRO 2 and 3 fail with the reentrant kind
        model.lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = Objective(recipe, model)
    follows = recipe.tasks["xlco"] and recipe.contrast.keys == "momentum"
    copied = copy.deepcopy(model.sentence_encoder()) if follows else None  # before the engine cuts the model up
    engine = Engine(objective, inputs.identity.engine, recipe.optimizer, recipe.batch.lanes)
    momentum = queue = None
    contrast = recipe.contrast
    if copied is not None:
        momentum = MomentumEncoder(
            model.sentence_encoder(), engine.copy(copied), engine.masters, engine.write, contrast.momentum
        )
    if recipe.tasks["xlco"] and contrast.uses_queue:
        width = model.lm.config.hidden_size
        how = contrast.queue
        queue = KeyQueue(how.size, width, N_TEXTS[contrast.mixup], dist.device(), how.sharded)
    state = TrainState(
        inputs.identity,
        vocabulary,
        inputs.loader,
        objective,
        engine,
        momentum,
        queue,
        inputs.checkpoints,
        inputs.probe,
    )
    if found is not None:
        saved = inputs.checkpoints.load(found, engine, momentum, queue)
        state.step, state.consumed, state.best = saved.step, saved.consumed, saved.best
        _check_filling(recipe, state)
        inputs.loader.restore(saved.consumed, saved.cursors)
    elif dist.rank() == 0:
        # What an export needs beside the weights.
        shutil.copytree(recipe.corpus / "tokenizer", recipe.run / "model", dirs_exist_ok=True)
        model.lm.config.save_pretrained(recipe.run / "model")
    return state


def _check_filling(recipe: Recipe, state: TrainState) -> None:
    """UserError where a queue that was made larger would not fill in the steps that are left."""
    queue, left = state.queue, recipe.optimizer.steps - state.step
    if queue is None or queue.filled == 1 or left == 0:
        return
    coming = left * recipe.batch.lanes * recipe.batch.xlco_pairs
    if coming <= round((1 - queue.filled) * queue.size):
        raise UserError(
            f"contrast.queue.size {queue.size}: the queue holds {queue.filled:.0%} and the {left} steps that are left "
            f"bring {coming} pairs, so it would never be full: set a smaller one"
        )


def launch(recipe_path: Path, overrides: list[str], ranks: int | None = None) -> int:
    """Run `main` under DeepSpeed's launcher on this machine: every GPU, or `ranks` CPU processes (two, if the lanes
    allow it)."""
    recipe = load_recipe(recipe_path, overrides)
    if sys.stdin.isatty() and not recipe.resume.fallback and _agrees_to_fall_back(recipe):
        overrides = [*overrides, "resume=" + json.dumps(recipe.resume.model_dump() | {"fallback": True})]
        recipe = load_recipe(recipe_path, overrides)
    ranks = ranks or _default_ranks(recipe.batch.lanes)
    if check_inputs(recipe, 0, ranks).finished:  # and a mistake is one line, not one of the launcher's as well
        return 0
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if torch.cuda.is_available() else ""
    # The launcher drops CUDA_VISIBLE_DEVICES where a number of devices is given.
    chosen = ["--include", f"localhost:{','.join(visible.split(',')[:ranks])}"] if visible else []
    command = [str(Path(sys.executable).with_name("deepspeed")), *(chosen or ["--num_accelerators", str(ranks)])]
    command += ["--log_level", "critical", "--master_port", str(_free_port()), "--no_local_rank"]
    command += [__file__, str(recipe_path), *overrides]
    # A session of its own: ^C in a terminal comes here alone, and is passed on to the ranks alone.
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        """The launcher itself would leave the ranks 30 seconds to save."""
        nonlocal asked
        asked = True
        launcher = psutil.Process(process.pid)
        ranks = [child for child in launcher.children(recursive=True) if not child.children()]
        for leaf in ranks or [launcher]:
            leaf.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    code = process.wait()
    if asked and code in (-signal.SIGTERM, 256 - signal.SIGTERM):  # before the ranks had anything to save
        return STOPPED_ON_REQUEST
    return code if code in (0, 2, STOPPED_ON_REQUEST) else 1  # a rank's death by a signal has a number of its own


def _agrees_to_fall_back(recipe: Recipe) -> bool:
    """Ask, where the newest checkpoint is damaged and there is another."""
    store = Store(recipe.run)
    newest = store.latest()
    older = [path for path in store.steps() if path != newest]
    if newest is None or not older:
        return False
    damage = read_through(newest, Console(stderr=True))
    return bool(damage) and typer.confirm(f"{newest}: {damage}.\nGo on from {older[-1].name} instead?")


def _summary(state: TrainState) -> str:
    recipe = state.recipe
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in state.objective.parameters())  # stage 3's are cut up
    tasks = "+".join(task for task, used in recipe.tasks.items() if used)
    where = (
        f"{dist.world_size()} rank(s) on {dist.device().type}, {recipe.batch.lanes} lanes, ZeRO {state.engine.stage}, "
        f"{precision_of(state.identity.engine)}"
    )
    queue = state.queue
    filling = ""
    if queue is not None and queue.filled < 1:
        filling = f"; the queue holds {queue.filled:.0%} of {len(queue)} keys and is read once it is full"
    return (
        f"{recipe.run}: {tasks}, {parameters / 1e6:.1f}M parameters, {where}, "
        f"step {state.step} of {recipe.optimizer.steps}{filling}"
    )


def _default_ranks(lanes: int) -> int:
    most = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    ranks = max(n for n in range(1, most + 1) if lanes % n == 0)
    if ranks < torch.cuda.device_count():
        print(f"using {ranks} of {most} GPUs: batch.lanes is {lanes}, which more do not divide")
    return ranks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
