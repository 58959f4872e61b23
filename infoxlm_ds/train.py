"""What the DeepSpeed launcher runs: `deepspeed infoxlm_ds/train.py recipes/demo.yaml [key.path=value ...]`."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import shutil
import signal
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from infoxlm_ds import dist, trainer
from infoxlm_ds.checkpoint.checkpoints import Checkpoints
from infoxlm_ds.checkpoint.identity import Identity
from infoxlm_ds.config import Recipe, UserError, load_recipe
from infoxlm_ds.data.batch import N_TEXTS, longest_sequence
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.data.reader import Corpus
from infoxlm_ds.engine import Engine, NotJoined, start_ranks
from infoxlm_ds.engine_config import check_device, load_engine_config, precision_of
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
        start_ranks(recipe.timeout)
        inputs = agreed_inputs(recipe)
        if dist.from_first_rank(inputs.finished):
            return 0
        inputs.checkpoints.lock()
    except UserError as error:
        return _mistake(error)
    except NotJoined as error:
        if dist.local_rank() == 0:
            print(f"infoxlm: {error}", file=sys.stderr)
        return 1
    return _run(inputs)


def agreed_inputs(recipe: Recipe) -> Inputs:
    """UserError on all ranks where one of them meets it: a host may lack what others have. Collective."""
    inputs, mistake = None, ""
    try:
        inputs = check_inputs(recipe, dist.rank(), dist.world_size())
        check_device(inputs.identity.engine)
    except UserError as error:
        mistake = f"rank {dist.rank()} on {failures.here().host}: {error}" if dist.rank() else str(error)
    if mistakes := [said for said in dist.gather_objects(mistake) if said]:
        raise UserError(mistakes[0])
    assert inputs is not None
    return inputs


def _run(inputs: Inputs) -> int:
    """Build and fit; whatever ends it, every rank ends and its cause is told."""
    run, store = inputs.identity.recipe.run, inputs.checkpoints.store
    if dist.rank() == 0:
        failures.forget(run)
    where = dist.gather_objects(failures.here())
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
    """The same on every rank; before they have met, perhaps only on this host."""
    if (dist.rank() if dist.active() else dist.local_rank()) == 0:
        print(f"infoxlm: {error}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, read and found to fit together."""

    identity: Identity
    corpus: Corpus
    loader: Loader
    checkpoints: Checkpoints
    finished: bool  # the newest checkpoint is of the recipe's last step, as the first rank sees
    probe: RetrievalProbe | None


def check_inputs(recipe: Recipe, rank: int, world: int) -> Inputs:
    """Read all that the recipe names, for one of `world` ranks. UserError for the first thing that is missing or does
    not fit; nothing is written. The first rank alone looks at every file of the corpus and at the run's checkpoints:
    thousands that did would keep a shared file system busy."""
    engine_config = load_engine_config(recipe.engine)
    corpus = Corpus(recipe.corpus, look_at_files=rank == 0)
    tokenizer = recipe.corpus / "tokenizer"
    check_fit(recipe.model, tokenizer, longest_sequence(recipe, corpus))
    loader = Loader(recipe, corpus, rank, world)
    checkpoints = Checkpoints(recipe)
    hashes = {file.name: file.sha256 for file in corpus.manifest.tokenizer.files}
    identity = Identity(recipe, engine_config, corpus.manifest.sha256, hashes)
    finished = rank == 0 and checkpoints.check(identity)
    longest = corpus.manifest.max_tokens + corpus.manifest.tokenizer.overhead(1)
    probe = RetrievalProbe(recipe.probe, tokenizer, longest) if recipe.probe else None
    if finished:
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


if __name__ == "__main__":
    sys.exit(main())
