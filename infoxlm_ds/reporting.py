"""Tells the user about a run: figures, probes, saves, and steps that were not applied."""

from __future__ import annotations

import os
import resource
import shlex
from collections.abc import Iterator
from statistics import fmean

import psutil
import torch
import yaml

from infoxlm_ds import dist, freed_memory
from infoxlm_ds.checkpoint.checkpoints import Best
from infoxlm_ds.checkpoint.identity import FREE, leaves
from infoxlm_ds.checkpoint.protocol import Outcome
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.engine.engine import NotFinite, learning_rate_at
from infoxlm_ds.monitor.history import METRICS
from infoxlm_ds.monitor.meters import Interval, Scalars, by_language, scalars
from infoxlm_ds.monitor.progress import LOSSES, clock, short
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.monitor.starts import STARTS, environment, record_start
from infoxlm_ds.monitor.tags import of_languages
from infoxlm_ds.monitor.watchdogs import Seen, Watchdogs
from infoxlm_ds.objective import Report
from infoxlm_ds.planner.speed import Gpu, known_gpu, mfu
from infoxlm_ds.state import TrainState

SHOWN_PAIRS = 100  # of more pairs of languages, the boards show the languages only


def watchdogs(state: TrainState) -> Watchdogs:
    """What looks at the figures of this run. Only rank 0 needs it."""
    if dist.device().type == "cuda":
        memory, ranks = torch.cuda.get_device_properties(dist.device()).total_memory, 1
    else:
        memory, ranks = psutil.virtual_memory().total, int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
    return Watchdogs(Seen(state.recipe, state.shares, state.pairs, memory / ranks / 2**30))


def say(sinks: Sinks | None, text: str) -> None:
    """Print a line on rank 0's screen."""
    if sinks is not None:
        sinks.say(text)


def count(state: TrainState, lane: JointBatch, report: Report) -> None:
    """Add a lane of an applied step to the figures of the interval."""
    meter, names = state.meter, lane.names
    meter.add(report.sums | {"tokens": lane.text_tokens})
    meter.count_languages(names)
    sequences, firsts = lane.masked_sequences, {"mmlm": 0, "tlm": len(names.get("mmlm", ()))}
    for task, part in lane.masked_parts.items():
        if len(report.masked[part]):
            meter.add_rows(task, names[task], report.masked[None, part], sequences[part] - firsts[task])
    if report.contrast is not None and report.pair_names is not None:
        meter.add_rows("xlco", report.pair_names, report.contrast)


def log(state: TrainState, sinks: Sinks | None, seconds_a_step: float) -> None:
    """Write the figures of the interval since the last log. Collective."""
    interval = state.meter.collect()
    if dist.device().type == "cpu":
        freed_memory.give_back()
    values = _figures(state, interval, first_rank=sinks is not None)
    state.observed = {}
    if sinks is None:
        return
    more = {"languages": interval.languages, "pairs": interval.means("xlco"), "seconds": interval.seconds}
    masked = {task: interval.means(task) for task in ("mmlm", "tlm") if task in interval.rows}
    if dist.world_size() > 1:
        more["slowest"] = interval.work.index(max(interval.work))
    sinks.write(state.step, values, more | {"masked": masked}, _by_language(state, interval))
    if state.queue is not None and state.queue.filled == 1.0 and state.due(state.recipe.log.geometry):
        sinks.histogram(state.step, "contrast/queue_age", state.step - state.queue.steps.numpy())
    sinks.progress(state.step, values, (state.recipe.optimizer.steps - state.step) * seconds_a_step)


def _figures(state: TrainState, interval: Interval, first_rank: bool) -> Scalars:
    """The scalars of an interval. Only the first rank knows its MFU. Collective."""
    sums, seconds, world = interval.sums, interval.seconds, dist.world_size()
    steps = sums["steps"] / world
    values: Scalars = {"loss": sums["loss"] / steps} | scalars(sums, state.vocabulary)
    values |= {
        "optimizer/gradient_norm": state.engine.gradient_norm,
        "optimizer/learning_rate": learning_rate_at(state.step, state.recipe.optimizer),
        "optimizer/skipped_steps": sums.get("skipped", 0) / world,
        "memory/peak": peak_memory(),
        "speed/tokens": sums["tokens"] / seconds,
        "speed/data_wait_share": sums["data_wait"] / world / seconds,
    }
    if first_rank and (gpu := this_gpu()):
        values["speed/mfu"] = mfu(state.operations * steps, seconds, gpu.peak, world)
    if world > 1:
        values["speed/slowest_rank"] = max(interval.work) / fmean(interval.work) - 1
    if state.loader.left_out:
        values["data/damaged_draws"] = len(state.loader.left_out)
    if state.engine.loss_scale != 1:
        values["optimizer/loss_scale"] = state.engine.loss_scale
    if state.queue is not None:
        values["queue/filled"] = state.queue.filled
        if state.queue.filled == 1.0:
            values["queue/mean_age"] = state.queue.mean_age(state.step)
    return values | state.observed


def _by_language(state: TrainState, interval: Interval) -> Scalars:
    """The losses of each language and, if they are few, of each pair of languages, by tag."""
    values: Scalars = {}
    for task, rows in interval.rows.items():
        values |= {of_languages(task, name): loss for name, loss in by_language(rows, state.pairs).items()}
        if task != "mmlm" and len(state.pairs) <= SHOWN_PAIRS:
            values |= {of_languages(task, name): means["loss"] for name, means in interval.means(task).items()}
    return values


def begin(state: TrainState, sinks: Sinks) -> None:
    """Record this start of the run, and describe the run to the boards."""
    recipe = state.recipe.model_dump(mode="json", exclude_defaults=True)
    compared = {key: value for key, value in recipe.items() if key not in FREE}
    found = environment(state.step) | {"steps": state.recipe.optimizer.steps}
    try:
        record_start(state.recipe.run, found)
    except OSError as error:
        sinks.say(
            f"{state.recipe.run / STARTS} cannot be written: {error.strerror}. A model card will not know this start"
        )
    texts = {
        "recipe": f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```",
        "environment": f"```yaml\n{yaml.safe_dump(found, sort_keys=False)}```",
    }
    sinks.begin(texts, {key: x for key, x in leaves(compared) if isinstance(x, int | float | str)})


def end(state: TrainState, sinks: Sinks, done: bool, seconds: float) -> None:
    """Say how this start of the run ended, where things lie and what can be done with them."""
    sinks.write(state.step, {}, {"ended": "finished" if done else "stopped"})
    if done:
        sinks.say(f"finished: step {state.step}, after {clock(seconds)}")
    else:
        sinks.say(f"stopped on request at step {state.step}, saved: run the same command again to go on")
    for head, line in (*_results(state, sinks), *_places(state)):
        sinks.say(f"  {head:<12} {line}")


def _results(state: TrainState, sinks: Sinks) -> Iterator[tuple[str, str]]:
    if losses := [f"{label} {short(sinks.last[name])}" for name, label in LOSSES.items() if name in sinks.last]:
        yield "losses", ", ".join(losses)
    if state.best is not None:
        yield "best probe", f"{state.best.value:.3f} at step {state.best.step}"
    if sinks.watchdogs:
        for name, text in sinks.watchdogs.said.items():
            yield "warning", f"{text} ({sinks.watchdogs.held[name]} lines of the log)"


def _places(state: TrainState) -> Iterator[tuple[str, str]]:
    run, probe = state.recipe.run, state.recipe.probe
    yield "checkpoint", str(state.checkpoints.store.latest())
    yield "figures", str(run / METRICS)
    yield "next", shlex.join(["infoxlm", "export", str(run), str(run / "export")])
    text = (
        ["--data", str(probe.data), "--pivot", probe.pivot, "--min-pairs", "2"]
        if probe
        else ["--data", "PARALLEL_TEXT"]
    )
    yield "", shlex.join(["infoxlm", "eval", "retrieval", "--model", str(run / "export"), *text])
    yield "", shlex.join(["infoxlm", "report", str(run), str(run / "report.html")])


def probe(state: TrainState, sinks: Sinks | None) -> None:
    """Measure retrieval on held-out text. Collective."""
    assert state.probe is not None
    encoder, log = state.objective.model.sentence_encoder(), state.recipe.log
    probed = state.probe.run(encoder, pictured=log.tensorboard or log.wandb is not None)
    values = probed.scores
    if state.best is None or values["probe/mean"] > state.best.value:
        state.best = Best(state.step, values["probe/mean"])
    values["probe/best"] = state.best.value
    if sinks is not None:
        sinks.write(state.step, values)
        for tag, picture in probed.pictures.items():
            sinks.picture(state.step, tag, picture)
        beside = f"best {state.best.value:.3f} at step {state.best.step}, trigrams {values['probe/trigram_mean']:.3f}"
        sinks.say(f"step {state.step}: held-out accuracy@1 {values['probe/mean']:.3f} ({beside})")


def tell_of_skip(state: TrainState, sinks: Sinks | None) -> None:
    """Say why the last step was not applied. NotFinite after `optimizer.most_skipped` such steps in a row."""
    why, times = state.skipped[-1], len(state.skipped)
    if sinks is not None:
        sinks.write(state.step, {}, {"skipped": why})
        sinks.warn(f"the step after {state.step} was not applied ({times} in a row): {why}")
    if times == state.recipe.optimizer.most_skipped:
        good = state.checkpoints.store.latest()
        on = f"go on from {good.name}, with resume.allow_change=[optimizer.learning_rate] and" if good else "start with"
        raise NotFinite(
            f"{times} steps in a row after step {state.step} were not applied: {why}. Look at that data, or {on} a "
            "lower optimizer.learning_rate"
        )


def tell_of_damage(state: TrainState, sinks: Sinks | None, known: int) -> None:
    """Name the damaged packs that the last step found, but for the first `known`."""
    for what in state.loader.left_out[known:]:
        say(sinks, f"the step after {state.step}: pack {what.pack} is damaged, {what.stream} goes on without it")


def tell_of_save(state: TrainState, sinks: Sinks | None, outcome: Outcome | None) -> None:
    """Report what a save cost, or why it failed. After a failed save, training goes on and saves again when the next
    save is due. `outcome` is None if no save has ended."""
    if outcome is None:
        return
    state.unsaved = outcome.problem
    if sinks is None:
        return
    if outcome.problem:
        newest = state.checkpoints.store.latest()
        sinks.warn(
            f"the checkpoint of step {outcome.step} could not be written: {outcome.problem}. "
            + (f"The newest is {newest.name}, as before" if newest else "There is none yet")
        )
        sinks.write(state.step, {}, {"save_failed": outcome.problem})
        return
    values = {"blocked": outcome.blocked, "seconds": outcome.took, "gigabytes": outcome.bytes / 1e9}
    sinks.write(state.step, {f"checkpoint/{name}": value for name, value in values.items()})


def this_gpu() -> Gpu | None:
    """The GPU of this rank, if its peak is known."""
    return known_gpu(torch.cuda.get_device_name()) if dist.device().type == "cuda" else None


def peak_memory() -> float:
    """The most memory that this rank has held so far, in GiB: a GPU's memory or, without a GPU,
    the process' resident memory."""
    if dist.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
