"""The loop. Read `fit`, then `train_step`."""

from __future__ import annotations

import ctypes
import resource
import signal
import time
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.checkpoint.checkpoints import Best, Checkpoints, Saved
from infoxlm_ds.checkpoint.identity import Identity
from infoxlm_ds.checkpoint.protocol import Outcome
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.engine import Engine, NotFinite, schedule
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.model.queue import KeyQueue
from infoxlm_ds.monitor.faults import explain, find_faults
from infoxlm_ds.monitor.meters import Meter, Scalars, scalars
from infoxlm_ds.monitor.probe import RetrievalProbe
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.objective import Objective, Report, StepContext


class SaveFailed(dist.AllRanksError):
    """The last checkpoint of a run could not be written."""


@dataclass
class TrainState:
    """All that a run is made of. `step` counts applied optimizer steps, `consumed` the steps' batches taken from the
    streams."""

    identity: Identity
    vocabulary: int
    loader: Loader
    objective: Objective
    engine: Engine
    momentum: MomentumEncoder | None
    queue: KeyQueue | None
    checkpoints: Checkpoints
    probe: RetrievalProbe | None
    step: int = 0
    consumed: int = 0
    best: Best | None = None  # of the probes
    unsaved: str = ""  # why the last save failed, if it did
    meter: Meter = field(default_factory=Meter)
    observed: Scalars = field(default_factory=dict)  # of single steps, until they are logged
    skipped: list[str] = field(default_factory=list)  # why each step since the last applied one was not applied
    again: list[JointBatch] | None = None  # a step's batches that only the loss scale kept from being applied

    @property
    def recipe(self) -> Recipe:
        return self.identity.recipe


def fit(state: TrainState, sinks: Sinks | None) -> bool:
    """Train to the recipe's last step. True when done; False when a signal asked to stop. Either way the last step is
    saved. NotFinite after `optimizer.most_skipped` steps in a row that were not applied, SaveFailed where the last step
    could not be saved.

    `sinks`: rank 0's, None elsewhere.
    """
    recipe, stop = state.recipe, _StopOnSignal()
    wanted = recipe.memory.dry_run
    if wanted if wanted is not None else dist.device().type == "cuda":
        peak = rehearse(state)
        if sinks is not None:
            sinks.say(f"a step with the longest batch took {peak:.1f} GiB at its peak")
    started, first = time.monotonic(), state.step
    started_save = logged = state.step

    def log() -> None:
        nonlocal logged
        _log(state, sinks, (time.monotonic() - started) / (state.step - first))
        logged = state.step

    while state.step < recipe.optimizer.steps and not stop.agreed():
        while not train_step(state):
            _report_skip(state, sinks)
        if (outcome := state.checkpoints.poll()) is not None:
            _report_save(state, sinks, outcome)
        if state.step == first + 1:
            dist.set_timeout(recipe.timeout.step)
        saving = _due(state, recipe.checkpoint.every)
        if saving or _due(state, recipe.log.every):  # no interval spans a checkpoint, so going on loses none
            log()
        if state.probe is not None and recipe.probe is not None and _due(state, recipe.probe.every):
            _probe(state, sinks)
        if saving:
            _save(state, sinks)
            started_save = state.step
    if started_save < state.step:
        if logged < state.step:
            log()
        _save(state, sinks)
    _end_save(state, sinks)
    if state.unsaved:
        raise SaveFailed(f"the last checkpoint could not be written: {state.unsaved}")
    return state.step >= recipe.optimizer.steps


def train_step(state: TrainState) -> bool:
    """One global batch: keys and counts of the whole step, one pass a lane, one update. True if the update was
    applied."""
    waited = time.monotonic()
    micros = state.again or next(state.loader)
    state.meter.add({"data_wait": time.monotonic() - waited})
    state.consumed += state.again is None
    state.again = None
    queue = state.queue.view() if state.queue is not None else None
    context = state.objective.prepare(micros, state.momentum, queue)
    scale, reports, reps, applied = state.engine.loss_scale, [], [], False
    for slot, micro in enumerate(micros):
        share, report, lane_reps = state.engine.forward(micro, context, slot)
        state.engine.backward(share)
        applied = state.engine.step(state.step)
        report.sums["loss"] = share.detach()
        reports.append(report)
        reps.append(lane_reps)
    if applied:
        _after_update(state, context, micros, reports, reps)
    else:
        state.meter.add({"skipped": 1})
        faults = find_faults(state.loader.lanes, micros, reports, reps)
        state.skipped.append(explain(faults, scale, state.engine.loss_scale))
        if not faults and state.engine.adapts_loss_scale:  # how often depends on the cluster, the data must not
            state.again = micros
    return applied


def rehearse(state: TrainState) -> float:
    """A step of which nothing stays, with the longest batch that the recipe can make on every lane. Returns the rank's
    peak of memory, in GiB. UserError where a GPU's memory does not suffice."""
    micros = [state.loader.longest_batch()] * len(state.loader.lanes)
    try:
        context = state.objective.prepare(micros, state.momentum, state.queue.view() if state.queue else None)
        state.engine.rehearse(state.engine.forward(m, context, slot)[0] for slot, m in enumerate(micros))
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            "a step with the longest batch does not fit into the GPU's memory: set a smaller batch.mmlm_tokens, "
            "batch.tlm_tokens or batch.xlco_pairs (and more batch.lanes), memory.activation_checkpointing=true, or an "
            f"engine configuration of a higher ZeRO stage; `infoxlm plan` estimates. {str(error).splitlines()[0]}"
        ) from None
    return peak_memory()


def _after_update(
    state: TrainState, context: StepContext, micros: list[JointBatch], reports: list[Report], reps: list[Tensor]
) -> None:
    """What moves with the weights: the count, the key encoder, the queue, the figures."""
    state.step += 1
    state.skipped.clear()
    state.meter.add({"steps": 1})
    for micro, report in zip(micros, reports, strict=True):
        state.meter.add(report.sums | {"tokens": len(micro.tokens.ids)})
        if report.contrast is not None:
            of = micros if context.cached is not None else [micro]
            state.meter.add_pairs(np.concatenate([m.names["xlco"] for m in of]), report.contrast)
        state.meter.count_languages(micro.names)
    if state.momentum is not None and _due(state, state.recipe.log.every):
        state.observed |= state.momentum.follow(state.step)
    elif state.momentum is not None:
        state.momentum.update(state.step)
    if state.queue is not None:
        state.queue.push(state.objective.new_keys(context, micros, reps), state.step)
    if _due(state, state.recipe.log.geometry):
        state.observed |= state.objective.geometry(context, micros, reps)


def peak_memory() -> float:
    """The most memory this rank has held so far, in GiB: a GPU's, else the process' resident memory."""
    if dist.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _report_skip(state: TrainState, sinks: Sinks | None) -> None:
    """Say why the last step was not applied; end the run where that was one too many in a row."""
    why, times = state.skipped[-1], len(state.skipped)
    if sinks is not None:
        sinks.write(state.step, {}, {"skipped": why})
        sinks.say(f"the step after {state.step} was not applied ({times} in a row): {why}")
    if times == state.recipe.optimizer.most_skipped:
        good = state.checkpoints.store.latest()
        on = f"go on from {good.name}, with resume.allow_change=[optimizer.learning_rate] and" if good else "start with"
        raise NotFinite(
            f"{times} steps in a row after step {state.step} were not applied: {why}. Look into that data, or {on} a "
            "lower optimizer.learning_rate"
        )


def _due(state: TrainState, every: int) -> bool:
    return state.step % every == 0 or state.step == state.recipe.optimizer.steps


def _return_freed_memory() -> None:
    """Batches differ in length, and glibc keeps what they leave: a CPU rank grew from 0.7 to 4.4 GB in 700 steps."""
    if dist.device().type == "cpu" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _log(state: TrainState, sinks: Sinks | None, seconds_a_step: float) -> None:
    sums, languages, pairs, seconds = state.meter.collect()
    _return_freed_memory()
    steps, world = sums["steps"] / dist.world_size(), dist.world_size()
    values: Scalars = {"loss": sums["loss"] / steps} | scalars(sums, state.vocabulary)
    values |= {
        "optimizer/gradient_norm": state.engine.gradient_norm,
        "optimizer/learning_rate": state.recipe.optimizer.learning_rate * schedule(state.step, state.recipe.optimizer),
        "optimizer/skipped_steps": sums.get("skipped", 0) / world,
        "memory/peak": peak_memory(),
        "speed/tokens": sums["tokens"] / seconds,
        "speed/data_wait_share": sums["data_wait"] / world / seconds,
    }
    if state.engine.loss_scale != 1:
        values["optimizer/loss_scale"] = state.engine.loss_scale
    if state.queue is not None:
        values["queue/filled"] = state.queue.filled
        if state.queue.filled == 1.0:
            values["queue/mean_age"] = state.queue.mean_age(state.step)
    values |= state.observed
    state.observed = {}
    if sinks is not None:
        sinks.write(state.step, values, {"languages": languages, "pairs": pairs, "seconds": seconds})
        sinks.progress(state.step, values, (state.recipe.optimizer.steps - state.step) * seconds_a_step)


def _probe(state: TrainState, sinks: Sinks | None) -> None:
    assert state.probe is not None
    values = state.probe.run(state.objective.model.sentence_encoder())
    if state.best is None or values["probe/mean"] > state.best.value:
        state.best = Best(state.step, values["probe/mean"])
    values["probe/best"] = state.best.value
    if sinks is not None:
        sinks.write(state.step, values)
        beside = f"best {state.best.value:.3f} at step {state.best.step}, trigrams {values['probe/trigram_mean']:.3f}"
        sinks.say(f"step {state.step}: held-out accuracy@1 {values['probe/mean']:.3f} ({beside})")


def _save(state: TrainState, sinks: Sinks | None) -> None:
    """Start to save, behind whatever of the last one is still under way; unless asynchronous, finish too."""
    _end_save(state, sinks)
    saved = Saved(state.step, state.consumed, state.loader.cursors, state.best)
    state.checkpoints.save(saved, state.identity, state.engine, state.momentum, state.queue)
    if not state.recipe.checkpoint.asynchronous:
        _end_save(state, sinks)


def _end_save(state: TrainState, sinks: Sinks | None) -> None:
    if (outcome := state.checkpoints.finish()) is not None:
        _report_save(state, sinks, outcome)


def _report_save(state: TrainState, sinks: Sinks | None, outcome: Outcome) -> None:
    """What a save cost, or why it failed: then training goes on, and saves again when it is due."""
    state.unsaved = outcome.problem
    if sinks is None:
        return
    if outcome.problem:
        newest = state.checkpoints.store.latest()
        sinks.say(
            f"the checkpoint of step {outcome.step} could not be written: {outcome.problem}. "
            + (f"The newest is {newest.name}, as before" if newest else "There is none yet")
        )
        sinks.write(state.step, {}, {"save_failed": outcome.problem})
        return
    values = {"blocked": outcome.blocked, "seconds": outcome.took, "gigabytes": outcome.bytes / 1e9}
    sinks.write(state.step, {f"checkpoint/{name}": value for name, value in values.items()})


class _StopOnSignal:
    """SIGINT and SIGTERM end the run after the current step, on all ranks at the same one."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return bool(dist.sum_over_ranks(torch.tensor(int(self._asked), device=dist.device())))
