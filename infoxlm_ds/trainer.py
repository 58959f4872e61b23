"""The training loop. Read `fit`, then `train_step`."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor

from infoxlm_ds import dist, reporting
from infoxlm_ds.config import UserError
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.data.stream import DamagedDraw
from infoxlm_ds.losses.keys import Keys
from infoxlm_ds.monitor.faults import explain, find_faults
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.objective import Report, Step
from infoxlm_ds.reporting import peak_memory
from infoxlm_ds.state import TrainState
from infoxlm_ds.xlco import Representations


class SaveFailed(dist.AllRanksError):
    """The last checkpoint of a run could not be written."""


class TooMuchDamage(dist.AllRanksError):
    """`on_damage` is skip, and more packs are damaged than a run should go on without."""


def fit(state: TrainState, sinks: Sinks | None) -> bool:
    """Train to the recipe's last step. Returns True if it was reached, False if a signal asked to stop. In both cases
    the last step is saved. NotFinite after `optimizer.most_skipped` steps in a row that were not applied.
    TooMuchDamage, see `_read`. SaveFailed if the last step could not be saved.

    `sinks`: rank 0's outputs; None on other ranks.
    """
    recipe, stop = state.recipe, _StopOnSignal()
    if _rehearses(recipe.memory.dry_run):
        reporting.say(sinks, f"a step with the longest batch took {rehearse(state):.1f} GiB at its peak")
    started, first = time.monotonic(), state.step
    started_save = logged = state.step

    def log() -> None:
        nonlocal logged
        reporting.log(state, sinks, (time.monotonic() - started) / (state.step - first))
        logged = state.step

    # A step that failed only because of the loss scale is made first: its data would be lost.
    while state.step < recipe.optimizer.steps and (state.again is not None or not stop.agreed()):
        known = len(state.loader.left_out)
        applied = train_step(state)
        reporting.tell_of_damage(state, sinks, known)
        if not applied:
            reporting.tell_of_skip(state, sinks)
            continue
        reporting.tell_of_save(state, sinks, state.checkpoints.poll())
        if state.step == first + 1:
            dist.set_timeout(recipe.timeout.step)
        saving = state.due(recipe.checkpoint.every)
        if saving or state.due(recipe.log.every):  # log before each save: a resumed run loses no figures
            log()
        if recipe.probe is not None and state.due(recipe.probe.every):
            reporting.probe(state, sinks)
        if saving:
            save(state, sinks)
            started_save = state.step
    if started_save < state.step:
        if logged < state.step:
            log()
        save(state, sinks)
    reporting.tell_of_save(state, sinks, state.checkpoints.finish())
    if state.unsaved:
        raise SaveFailed(f"the last checkpoint could not be written: {state.unsaved}")
    return state.step >= recipe.optimizer.steps


def _rehearses(wish: bool | None) -> bool:
    """Whether a step with the longest batch runs first. `wish`: the recipe's; None: on GPUs."""
    return dist.device().type == "cuda" if wish is None else wish


def train_step(state: TrainState) -> bool:
    """One global batch: prepare the keys and counts of the whole step, run one pass for each lane, make one update.
    Returns True if the update was applied."""
    lanes = _next_lanes(state)
    queue = state.queue.view() if state.queue is not None else None
    step = state.objective.prepare(lanes, state.momentum, queue)
    scale, reports, representations, applied = state.engine.loss_scale, [], [], False
    for slot, lane in enumerate(lanes):
        with state.meter.working():
            losses, report, own = state.engine.forward(lane, step, slot)
        loss = _added(losses)
        state.engine.backward(loss)
        applied = state.engine.step(state.step)
        report.sums["loss"] = loss.detach()
        reports.append(report)
        representations.append(own)
    if applied:
        _after_update(state, step, queue, lanes, reports, representations)
    else:
        state.meter.add({"skipped": 1})
        faults = find_faults(state.loader.lanes, lanes, reports, representations)
        state.skipped.append(explain(faults, scale, state.engine.loss_scale))
        # How often the loss scale overflows depends on the cluster. The data must not: take the same lanes again.
        if not faults and state.engine.adapts_loss_scale:
            state.again = lanes
    return applied


def _next_lanes(state: TrainState) -> list[JointBatch]:
    """This rank's lanes of the next step, on its device."""
    waited = time.monotonic()
    lanes = state.again or [lane.to(dist.device()) for lane in _read(state)]
    state.meter.add({"data_wait": time.monotonic() - waited})
    state.consumed += state.again is None
    state.again = None
    return lanes


def _read(state: TrainState) -> list[JointBatch]:
    """This rank's lanes of the next step. If `on_damage` is skip, all ranks leave out the packs that one of them finds
    damaged, so that all see the same order; collective then. TooMuchDamage if these are more than 1 % of the corpus."""
    if state.recipe.on_damage == "stop":
        return next(state.loader)
    while True:
        lanes, found = [], None
        try:
            lanes = next(state.loader)
        except DamagedDraw as error:
            found = error.what
        if dist.agree(found is None):
            return lanes
        state.loader.leave_out(sorted({what for what in dist.gather_objects(found) if what is not None}))
        damaged = sorted({what.pack for what in state.loader.left_out})
        if len(damaged) > max(1, state.loader.packs // 100):
            raise TooMuchDamage(
                f"{len(damaged)} of {state.loader.packs} packs are damaged ({', '.join(damaged[:5])}), more than 1 %: "
                f"restore the corpus {state.recipe.corpus}; `infoxlm prep verify` checks it"
            )


def _added(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _after_update(
    state: TrainState,
    step: Step,
    queue: Keys | None,
    lanes: Sequence[JointBatch],
    reports: Sequence[Report],
    representations: Sequence[Representations],
) -> None:
    """Everything that follows an applied update: the step count, the figures, the key encoder, the queue."""
    state.step += 1
    state.skipped.clear()
    state.meter.add({"steps": 1})
    for lane, report in zip(lanes, reports, strict=True):
        reporting.count(state, lane, report)
    if state.momentum is not None:
        if state.due(state.recipe.log.every):
            state.observed |= state.momentum.follow(state.step)
        else:
            state.momentum.update(state.step)
    described = state.recipe.tasks["xlco"] and state.due(state.recipe.log.geometry)
    if state.queue is None and not described:
        return
    second = state.objective.second_sides(step, lanes, representations)
    if state.queue is not None:
        state.queue.push(second, state.step)
    if described:
        state.observed |= state.objective.geometry(representations, second, queue)


def rehearse(state: TrainState) -> float:
    """Run a step with the longest batch that the recipe can make on every lane. Nothing of it stays. Returns the rank's
    peak of memory, in GiB. UserError if the GPU's memory is too small."""
    try:
        lanes = [state.loader.longest_batch().to(dist.device())] * len(state.loader.lanes)
        step = state.objective.prepare(lanes, state.momentum, state.queue.view() if state.queue else None)
        state.engine.rehearse(_added(state.engine.forward(lane, step, slot)[0]) for slot, lane in enumerate(lanes))
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            "a step with the longest batch does not fit into the GPU's memory: set a smaller batch.mmlm_tokens, "
            "batch.tlm_tokens or batch.xlco_pairs (and more batch.lanes), memory.activation_checkpointing=true, or an "
            "engine configuration of a higher ZeRO stage; `infoxlm plan` estimates the memory. "
            f"{str(error).splitlines()[0]}"
        ) from None
    return peak_memory()


def save(state: TrainState, sinks: Sinks | None) -> None:
    """Finish the last save if it is still under way, then start this one. If saves are not
    asynchronous, finish it too."""
    reporting.tell_of_save(state, sinks, state.checkpoints.finish())
    state.checkpoints.save(state.saved(), state.identity, state.engine, state.momentum, state.queue)
    if not state.recipe.checkpoint.asynchronous:
        reporting.tell_of_save(state, sinks, state.checkpoints.finish())


class _StopOnSignal:
    """SIGINT and SIGTERM end the run after the current step. All ranks end at the same step."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return bool(dist.sum_over_ranks(torch.tensor(int(self._asked))))
