"""The loop. Read `fit`, then `train_step`."""

from __future__ import annotations

import ctypes
import math
import signal
import time
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import torch

from infoxlm_ds import dist
from infoxlm_ds.checkpoint import Checkpoints, Identity, Saved
from infoxlm_ds.config import Recipe
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.engine import Engine, schedule
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.model.queue import KeyQueue
from infoxlm_ds.monitor.meters import Meter, Scalars, scalars
from infoxlm_ds.monitor.probe import RetrievalProbe
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.objective import Objective

MOST_SKIPPED = 20  # in a row


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
    meter: Meter = field(default_factory=Meter)
    geometry: Scalars = field(default_factory=dict)  # the last pass's, until it is logged

    @property
    def recipe(self) -> Recipe:
        return self.identity.recipe


def fit(state: TrainState, sinks: Sinks | None) -> bool:
    """Train to the recipe's last step. True when done; False when a signal asked to stop. Either way the last step is
    saved. RuntimeError after MOST_SKIPPED steps in a row that were not applied.

    `sinks`: rank 0's, None elsewhere.
    """
    recipe, stop = state.recipe, _StopOnSignal()
    started, first = time.monotonic(), state.step
    saved = logged = state.step
    skipped = 0

    def log() -> None:
        nonlocal logged
        _log(state, sinks, (time.monotonic() - started) / (state.step - first))
        logged = state.step

    while state.step < recipe.optimizer.steps and not stop.agreed():
        if not train_step(state):
            skipped += 1
            if skipped == MOST_SKIPPED:
                raise RuntimeError(
                    f"after step {state.step}, {skipped} steps in a row had gradients that are not finite"
                )
            continue
        skipped = 0
        saving = _due(state, recipe.checkpoint.every)
        if saving or _due(state, recipe.log.every):  # no interval spans a checkpoint, so going on loses none
            log()
        if state.probe is not None and recipe.probe is not None and _due(state, recipe.probe.every):
            _probe(state, sinks)
        if saving:
            _save(state)
            saved = state.step
    if saved < state.step:
        if logged < state.step:
            log()
        _save(state)
    return state.step >= recipe.optimizer.steps


def train_step(state: TrainState) -> bool:
    """One global batch: keys and counts of the whole step, one pass a lane, one update. True if the update was
    applied."""
    waited = time.monotonic()
    micros = next(state.loader)
    state.meter.add({"data_wait": time.monotonic() - waited})
    state.consumed += 1
    queue = state.queue.view() if state.queue is not None else None
    context = state.objective.prepare(micros, state.momentum, queue)
    reps, applied = [], False
    for slot, micro in enumerate(micros):
        share, report, lane_reps = state.engine.forward(micro, context, slot)
        state.engine.backward(share)
        applied = state.engine.step(state.step)
        reps.append(lane_reps)
        state.meter.add(report.sums | {"loss": share.detach(), "tokens": len(micro.tokens.ids)})
        if report.contrast is not None:
            of = micros if context.cached is not None else [micro]
            state.meter.add_pairs(np.concatenate([m.pairs for m in of]), report.contrast)
        state.meter.count_languages(micro.languages)
    state.meter.add({"skipped": int(not applied), "steps": 1})
    if applied:
        state.step += 1
        if state.momentum is not None:
            state.momentum.update()
        if state.queue is not None:
            state.queue.push(state.objective.new_keys(context, micros, reps), state.step)
        if _due(state, state.recipe.log.geometry):
            state.geometry = state.objective.geometry(context, micros, reps)
    return applied


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
        "optimizer/learning_rate": state.recipe.optimizer.learning_rate * schedule(state.step, state.recipe.optimizer),
        "optimizer/skipped_steps": sums["skipped"] / world,
        "speed/tokens": sums["tokens"] / seconds,
        "speed/data_wait_share": sums["data_wait"] / world / seconds,
    }
    if not math.isnan(norm := state.engine.gradient_norm):
        values["optimizer/gradient_norm"] = norm
    if state.queue is not None:
        values["queue/filled"] = state.queue.filled
        if state.queue.filled == 1.0:
            values["queue/mean_age"] = state.queue.mean_age(state.step)
    values |= state.geometry
    state.geometry = {}
    if sinks is not None:
        sinks.write(state.step, values, {"languages": languages, "pairs": pairs, "seconds": seconds})
        sinks.progress(state.step, values, (state.recipe.optimizer.steps - state.step) * seconds_a_step)


def _probe(state: TrainState, sinks: Sinks | None) -> None:
    assert state.probe is not None
    values = state.probe.run(state.objective.model.sentence_encoder())
    if sinks is not None:
        sinks.write(state.step, values)
        baseline = f"trigrams {values['probe/trigram_mean']:.3f}"
        sinks.say(f"step {state.step}: held-out accuracy@1 {values['probe/mean']:.3f} ({baseline})")


def _save(state: TrainState) -> None:
    saved = Saved(state.step, state.consumed, state.loader.cursors)
    state.checkpoints.save(saved, state.identity, state.engine, state.momentum, state.queue)


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
