"""Training steps of a recipe under the engine: their time and memory, where the time goes, and what makes the host
wait."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_inputs import inputs_of, recipe_of, vocabulary
from benchmarks.gpu_report import GIB, Part
from infoxlm_ds import objective
from infoxlm_ds.build import build
from infoxlm_ds.data.batch import N_TEXTS
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.planner.cost import useful
from infoxlm_ds.planner.memory import memory
from infoxlm_ds.planner.speed import mfu
from infoxlm_ds.planner.workload import Setting, Shape, read_text
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import rehearse, train_step

STEPS, WARM_UP, WATCHED, SPLIT, PROFILED = 200, 3, 20, 5, 2  # steps of each section
KERNELS = 15  # that are listed


def write(part: Part, name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="infoxlm-") as folder:
        state = None
        with part.section(f"{name}: a step"):
            state = start(part, name, Path(folder) / "run")
            _speed(part, state, left=0.55 if name == "base" else 0.1)
        if state is None:
            return
        if name == "base":
            with part.section(f"{name}: where the time of a step goes"):
                _split(part, state)
            with part.section(f"{name}: what makes the host wait for the GPU"):
                _waits(part, state)
            with part.section(f"{name}: the GPU's longest kernels"):
                _kernels(part, state)
        state.loader.close()


def start(part: Part, name: str, run: Path) -> TrainState:
    """A run with a full queue of random keys, after a rehearsal and some steps."""
    start_ranks()
    state = build(inputs_of(part, recipe_of(part, name, run)))
    fill(state)
    part.free()
    part.write(f"The rehearsal of the longest batch took {rehearse(state):.1f} GiB at its peak.", "")
    for _ in range(WARM_UP):
        assert train_step(state)
    return state


def fill(state: TrainState) -> None:
    """Fill the queue with random keys, which have no text in common with the batches."""
    queue, texts = state.queue, N_TEXTS[state.recipe.contrast.mixup]
    assert queue is not None
    vectors = 0.02 * torch.randn(queue.vectors.shape, device=queue.vectors.device)
    queue.push(Keys(vectors, torch.randint(2**60, (queue.size, texts))), 0)


def _speed(part: Part, state: TrainState, left: float) -> None:
    """`left`: the share of the remaining time that other sections need."""
    part.free()
    state.meter.collect()
    seconds = _seconds_of_steps(part, state, 5 if part.tiny else STEPS, part.before(left))
    sums, median = state.meter.collect().sums, statistics.median(seconds)
    recipe = state.recipe
    text = read_text(recipe, vocabulary(part))
    setting = Setting(recipe, state.identity.engine, Shape.of(recipe, text.vocabulary), text, 1)
    estimate, peak = memory(setting), part.operations_a_second()
    share = f"{mfu(useful(setting), median, peak, 1):.1%}" if peak else "unknown: the peak of this device is not known"
    lanes, shape = recipe.batch.lanes, setting.shape
    rows = [
        ("steps", f"{len(seconds)}, of {lanes} lanes"),
        ("parameters", f"{shape.whole / 1e6:,.1f} M, {shape.layers} layers of {shape.width}"),
        ("seconds of a step, median (10 % and 90 %)", _median(seconds)),
        ("tokens a second", f"{sums['tokens'] / sum(seconds):,.0f}"),
        ("useful operations of a step", f"{useful(setting) / 1e12:,.1f} T"),
        ("share of the GPU's peak in bf16 (MFU)", share),
        ("share of time that waits for data", f"{sums['data_wait'] / sum(seconds):.1%}"),
        ("peak of memory, GiB", f"{part.peak():.2f}"),
        ("`infoxlm plan`'s estimate, GiB", f"{estimate.peak / GIB:.2f}, at: {estimate.peak_at}"),
    ]
    if part.device.type == "cuda":
        rows.append(("reserved by torch's allocator, GiB", f"{torch.cuda.max_memory_reserved() / GIB:.2f}"))
    part.table(("", ""), rows)
    losses = {task: sums[f"{task}/loss"] / sums[f"{task}/items"] for task in objective.TASKS}
    part.write("Losses: " + ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items()))


def _median(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{statistics.median(seconds):.4f} ({low:.4f}, {high:.4f})"


def _seconds_of_steps(part: Part, state: TrainState, most: int, until: float) -> list[float]:
    """Seconds of each step, at least one. The device has finished a step before the next begins."""
    seconds: list[float] = []
    part.synchronise()
    while not seconds or (len(seconds) < most and time.monotonic() < until):
        started = time.perf_counter()
        assert train_step(state)
        part.synchronise()
        seconds.append(time.perf_counter() - started)
    return seconds


class Stopwatch:
    """Times calls on the device, by what they are for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._calls: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self._calls[label].append((begun, self._now()))

        return call

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """The sum over the calls. The device must have finished."""
        if not self._on_gpu:
            return {label: sum(end - begun for begun, end in calls) for label, calls in self._calls.items()}
        return {
            label: sum(begun.elapsed_time(end) for begun, end in calls) / 1000 for label, calls in self._calls.items()
        }


@contextmanager
def watched(state: TrainState, watch: Stopwatch) -> Iterator[None]:
    """Every call of these goes by the stopwatch."""
    engine, momentum, queue = state.engine, state.momentum, state.queue
    assert momentum is not None and queue is not None
    places: list[tuple[str, Any, str]] = [
        ("keys", momentum, "encode"),
        ("forward", engine, "forward"),
        ("LM head", objective, "masked_lm_losses"),
        ("contrast", state.objective.xlco, "share"),
        ("backward", engine, "backward"),
        ("optimizer", engine, "step"),
        ("momentum", momentum, "update"),
        ("queue", queue, "push"),
    ]
    with ExitStack() as patches:
        for label, owner, name in places:
            patches.enter_context(patch.object(owner, name, watch.timed(label, getattr(owner, name))))
        yield


def _split(part: Part, state: TrainState) -> None:
    watch = Stopwatch(part.device)
    with watched(state, watch):
        seconds = _seconds_of_steps(part, state, SPLIT, part.before(0.6))
    found, whole = watch.seconds(), sum(seconds)
    inside = found["LM head"] + found["contrast"]
    rows = {
        "keys, of the momentum encoder": found["keys"],
        "forward: encoder": found["forward"] - inside,
        "forward: LM head, with its gradient": found["LM head"],
        "forward: contrast, with its gradient": found["contrast"],
        "backward": found["backward"],
        "engine's step: gradient sums, clipping, AdamW": found["optimizer"],
        "momentum update": found["momentum"],
        "queue": found["queue"],
    }
    rows["the rest"] = whole - sum(rows.values())
    table = [(what, f"{1000 * s / len(seconds):.2f}", f"{s / whole:.1%}") for what, s in rows.items()]
    part.write(f"Between events around public calls, over {len(seconds)} steps. A wait of the GPU for the host counts.")
    part.table(("", "ms a step", "share"), table)


def _waits(part: Part, state: TrainState) -> None:
    """Count the warnings of torch's sync debug mode by file and line."""
    steps, cuda = (2 if part.tiny else WATCHED), part.device.type == "cuda"
    until, made = part.before(0.4), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            while made < steps and (made == 0 or time.monotonic() < until):
                assert train_step(state)
                made += 1
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{w.filename.removeprefix(str(Path(__file__).parent.parent) + '/').split('site-packages/')[-1]}:{w.lineno}"
        for w in caught
        if "synchronizing" in str(w.message)
    )
    part.write(f"{places.total()} warnings in {made} steps." if cuda else "Only a GPU gives warnings.")
    if places:
        part.table(("place", "a step"), [(place, f"{n / made:.1f}") for place, n in places.most_common(30)])


def _kernels(part: Part, state: TrainState) -> None:
    cuda = part.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        seconds = _seconds_of_steps(part, state, PROFILED, part.before(0.3))
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    if cuda:
        events = [event for event in events if event.device_type.name == "CUDA"]
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events.sort(key=lambda event: getattr(event, field), reverse=True)
    busy, made = sum(getattr(event, field) for event in events) / 1e6, len(seconds)
    part.write(f"Kernels ran {busy / sum(seconds):.0%} of {made} profiled steps ({sum(seconds) / made:.3f} s each).")
    rows = []
    for event in events[:KERNELS]:
        took = getattr(event, field) / 1e6
        rows.append(
            (f"`{event.key[:90]}`", f"{event.count / made:.0f}", f"{1000 * took / made:.2f}", f"{took / busy:.1%}")
        )
    part.table(("kernel", "calls a step", "ms a step", "share"), rows)
