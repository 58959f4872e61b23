"""Turns a recipe into a TrainState: checks everything that the recipe names, then builds the state or loads it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from infoxlm_ds import dist
from infoxlm_ds.checkpoint.checkpoints import Checkpoints
from infoxlm_ds.checkpoint.identity import Identity
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.batch import N_TEXTS, longest_sequence
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.engine.config import check_device, dtype_of, load_engine_config, offloaded, precision_of, stage_of
from infoxlm_ds.engine.engine import Engine
from infoxlm_ds.losses.queue import KeyQueue
from infoxlm_ds.model.attention import why_not_varlen
from infoxlm_ds.model.checksums import write_checksums
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.model.pretrained import build_model, check_fit, head_width
from infoxlm_ds.monitor import failures
from infoxlm_ds.monitor.boards import check_boards
from infoxlm_ds.monitor.probe import RetrievalProbe
from infoxlm_ds.objective import Objective
from infoxlm_ds.planner.mixture import planned_shares
from infoxlm_ds.state import TrainState

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """Everything that a recipe names. All of it was read and fits together."""

    identity: Identity
    corpus: Corpus
    loader: Loader
    checkpoints: Checkpoints
    finished: bool  # the newest checkpoint is of the recipe's last step; only rank 0 knows, others have False
    probe: RetrievalProbe | None


def agreed_inputs(recipe: Recipe) -> Inputs:
    """Run `check_inputs` on every rank. UserError on all of them if one finds a mistake. Collective."""

    def checked() -> Inputs:
        inputs = check_inputs(recipe, dist.rank(), dist.world_size())
        check_device(inputs.identity.engine)
        compiles(recipe, inputs.identity.engine)
        return inputs

    return _agreed(checked)


def _agreed(job: Callable[[], T]) -> T:
    """The result of a job that is not collective. If one rank finds a mistake, all ranks raise UserError: a host may
    lack what others have. Collective."""
    result, mistake = None, ""
    try:
        result = job()
    except UserError as error:
        mistake = f"rank {dist.rank()} on {failures.here().host}: {error}" if dist.rank() else str(error)
    if first := dist.first_problem(mistake):
        raise UserError(first)
    assert result is not None
    return result


def check_inputs(recipe: Recipe, rank: int, world: int) -> Inputs:
    """Read everything that the recipe names, for one of `world` ranks. UserError for the first thing that is missing or
    does not fit. Writes nothing. Only rank 0 looks at every file of the corpus and at the run's checkpoints: thousands
    of ranks would keep a shared file system busy."""
    engine_config = load_engine_config(recipe.engine)
    check_boards(recipe.log)
    corpus = Corpus(recipe.corpus, look_at_files=rank == 0)
    positions = check_fit(recipe.model, corpus.tokenizer, longest_sequence(recipe, corpus))
    slow = why_not_varlen(dist.device(), dtype_of(engine_config), head_width(recipe.model))
    if slow and rank == 0 and dist.device().type == "cuda":
        print(f"attention runs in groups of sentences, which is slower than one call for all: {slow}")
    loader = Loader(recipe, corpus, rank, world, varlen=slow is None)
    checkpoints = Checkpoints(recipe)
    hashes = {file.name: file.sha256 for file in corpus.manifest.tokenizer.files}
    identity = Identity(recipe, engine_config, corpus.manifest.sha256, hashes)
    finished = rank == 0 and checkpoints.check(identity)
    probe = RetrievalProbe(recipe.probe, corpus.tokenizer, positions) if recipe.probe else None
    if rank == 0:
        for key, why in without_effect(recipe, corpus):
            print(f"{key} has no effect: {why}", flush=True)
    if finished:
        print(f"{recipe.run}: finished at step {recipe.optimizer.steps}, nothing to do")
    return Inputs(identity, corpus, loader, checkpoints, finished, probe)


def build(inputs: Inputs) -> TrainState:
    """Everything that `fit` needs, from scratch or from the run's newest checkpoint. Collective."""
    checkpoint = inputs.checkpoints.find(inputs.identity)
    state = _from_scratch(inputs)
    recipe = state.recipe
    if checkpoint is not None:
        saved = inputs.checkpoints.load(checkpoint, state.engine, state.momentum, state.queue)
        state.step, state.consumed, state.best = saved.step, saved.consumed, saved.best
        _check_filling(state)
        inputs.loader.restore(saved.consumed, saved.cursors, saved.left_out)
    if dist.rank() == 0:  # an export needs these files beside the weights; a start mends them
        folder = recipe.run / "model"
        shutil.copytree(inputs.corpus.tokenizer, folder, dirs_exist_ok=True)
        state.objective.model.lm.config.save_pretrained(folder)
        write_checksums(folder)
    return state


def _from_scratch(inputs: Inputs) -> TrainState:
    recipe, contrast = inputs.identity.recipe, inputs.identity.recipe.contrast
    tokenizer = inputs.corpus.manifest.tokenizer
    model = _agreed(partial(build_model, recipe.model, tokenizer.vocab_size, recipe.seed, tokenizer.special_ids))
    if recipe.memory.activation_checkpointing:  # ZeRO 2 and 3 fail with the reentrant kind
        model.lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.compiled = compiles(recipe, inputs.identity.engine)
    objective = Objective(recipe, model, recipe.batch.lanes // dist.world_size())
    follows = recipe.tasks["xlco"] and contrast.keys == "momentum"
    copied = copy.deepcopy(model.sentence_encoder()) if follows else None  # before the engine shards the model
    engine = Engine(objective, inputs.identity.engine, recipe.optimizer, recipe.batch.lanes)
    momentum = queue = None
    if copied is not None:
        source = model.sentence_encoder()
        momentum = MomentumEncoder(source, engine.copy(copied), engine.masters, engine.writer, contrast.momentum)
    if recipe.tasks["xlco"] and contrast.uses_queue:
        width, settings = model.lm.config.hidden_size, contrast.queue
        queue = KeyQueue(settings.size, width, N_TEXTS[contrast.mixup], dist.device(), settings.sharded)
    return TrainState(
        identity=inputs.identity,
        vocabulary=tokenizer.vocab_size,
        loader=inputs.loader,
        objective=objective,
        engine=engine,
        momentum=momentum,
        queue=queue,
        checkpoints=inputs.checkpoints,
        probe=inputs.probe,
        pairs=inputs.corpus.pairs,
        shares=_shares(inputs) if dist.rank() == 0 else {},
    )


def _shares(inputs: Inputs) -> dict[str, dict[str, float]]:
    """Each language's share of the texts of each task, if it is the same in the whole run and can be read."""
    recipe = inputs.identity.recipe
    try:
        return {} if recipe.sampling.stages else planned_shares(recipe, inputs.corpus)
    except UserError:  # the pack in which languages are counted is damaged: the loader will say so
        return {}


def without_effect(recipe: Recipe, corpus: Corpus) -> Iterator[tuple[str, str]]:
    """Keys that the user has set though nothing reads them, and why."""
    contrast, model, pivot = recipe.contrast, recipe.model, recipe.sampling.pivot
    if contrast.keys == "gradient" and "momentum" in contrast.model_fields_set:
        yield "contrast.momentum", "contrast.keys is gradient, so there is no key encoder"
    if not contrast.uses_queue and "queue" in contrast.model_fields_set:
        yield "contrast.queue", "contrast.negatives is in_batch"
    if model.init is not None:
        for key in sorted(model.model_fields_set & {"type", "layers", "width", "heads", "feed_forward", "positions"}):
            yield f"model.{key}", "model.init has its own shape"
    if pivot is not None and not any(s.kind == "nway" and pivot in s.languages for s in corpus.sources):
        yield "sampling.pivot", f"the corpus has no n-way rows with {pivot}"


def compiles(recipe: Recipe, engine: dict[str, Any]) -> bool:
    """Whether layers are compiled. UserError if they cannot be."""
    wish = recipe.memory.compile
    if wish and stage_of(engine) == 3:
        raise UserError(
            "memory.compile does not work at ZeRO stage 3, which exchanges weights inside a layer: remove it"
        )
    return dist.device().type == "cuda" and stage_of(engine) < 3 if wish is None else wish


def _check_filling(state: TrainState) -> None:
    """UserError if a queue that was made larger would not fill in the steps that are left."""
    queue, batch = state.queue, state.recipe.batch
    left = state.recipe.optimizer.steps - state.step
    if queue is None or queue.filled == 1 or left == 0:
        return
    coming = left * batch.lanes * batch.xlco_pairs
    if coming <= round((1 - queue.filled) * queue.size):
        raise UserError(
            f"contrast.queue.size {queue.size}: the queue holds {queue.filled:.0%}, and the {left} steps that are left "
            f"bring {coming} pairs, so it would never be full: set a smaller size"
        )


def summary(state: TrainState) -> str:
    """One line about the training that is to start."""
    recipe, queue = state.recipe, state.queue
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in state.objective.parameters())  # stage 3 shards p
    tasks = "+".join(recipe.used_tasks)
    where = (
        f"{dist.world_size()} rank(s) on {dist.device().type}, {recipe.batch.lanes} lanes, ZeRO {state.engine.stage}, "
        f"{precision_of(state.identity.engine)}"
    )
    engine = state.identity.engine
    spares = state.engine.stage in (1, 2) and precision_of(engine) == "fp32" and not offloaded(engine, "optimizer")
    if spares and dist.world_size() == 1:
        where += " (one rank in fp32 is faster with stage 0, engine: zero0_fp32)"
    filling = ""
    if queue is not None and queue.filled < 1:
        filling = f"; the queue holds {queue.filled:.0%} of {len(queue)} keys and is read once it is full"
    return (
        f"{recipe.run}: {tasks}, {parameters / 1e6:.1f}M parameters, {where}, "
        f"step {state.step} of {recipe.optimizer.steps}{filling}"
    )
