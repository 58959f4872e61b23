"""Our training step and that of users of Hugging Face transformers, on one GPU, on the same items of one lane."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import Case, Work, real_tokens
from benchmarks.gpu_inputs import inputs_of, recipe_of, runs_varlen
from benchmarks.gpu_report import Part
from benchmarks.gpu_steps import fill
from benchmarks.ours import FixedLanes
from benchmarks.peers import NAIVE, TUNED, Peer, Way
from infoxlm_ds.build import build
from infoxlm_ds.data.batch import BatchBuilder
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.model.pretrained import build_model
from infoxlm_ds.objective import TASKS
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import train_step

BATCHES, WARM_UP, STEPS = 4, 3, 12
OURS = "ours, ZeRO 1, bf16"


class Row(NamedTuple):
    """`losses`: of the first step."""

    seconds: float
    peak: float
    losses: dict[str, float]


def write(part: Part, name: str) -> None:
    rows: dict[str, Row] = {}
    with part.section("Peers: the same items on one GPU"), tempfile.TemporaryDirectory(prefix="infoxlm-") as folder:
        start_ranks()
        before = part.allocated()
        state, work = _prepare(part, Path(folder) / "run")
        part.write(
            f"Base, one lane a step, {real_tokens(work):,.0f} real tokens with keys. Peers hold weights in fp32 and "
            "compute under autocast in bf16.",
            "",
        )
        rows[OURS] = _measure(part, _Ours(state, work), before)
        state = None
        for label, way, attention in _peers(part):
            if time.monotonic() > part.until:
                part.write(f"- {label}: not measured, the time was up")
                continue
            part.free()
            before = part.allocated()
            try:
                peer = Peer(work, {"step": way}, 0, 1, device=part.device, autocast=True, attention=attention)
                rows[label] = _measure(part, peer, before)
            except torch.cuda.OutOfMemoryError as error:
                part.write(f"- {label}: does not fit into memory: {str(error).splitlines()[0]}")
            except Exception as error:
                part.failed.append(label)
                part.write(f"- **FAILED** {label}: {type(error).__name__}: {str(error)[:500]}")
            peer = None  # type: ignore[assignment]
        _table(part, rows)


def _prepare(part: Part, run: Path) -> tuple[TrainState | None, Work]:
    recipe = recipe_of(part, "base", run, small_lane=True)
    inputs = inputs_of(part, recipe)
    builder = BatchBuilder(recipe, inputs.corpus, [0], dense=not runs_varlen(part, inputs))
    batches = [[builder.build(0, step)] for step in range(BATCHES)]
    state = build(inputs)
    fill(state)
    assert state.queue is not None
    keys = Keys(state.queue.vectors.cpu().clone(), state.queue.ids.clone())
    tokenizer = inputs.corpus.manifest.tokenizer
    model = build_model(recipe.model, tokenizer.vocab_size, recipe.seed, tokenizer.special_ids)
    return state, Work(Case(), recipe, inputs.corpus, model, batches, keys)


class _Ours:
    def __init__(self, state: TrainState | None, work: Work) -> None:
        assert state is not None
        loader: Any = FixedLanes(work.batches, [0])
        state.loader, self._state = loader, state

    def step(self) -> None:
        assert train_step(self._state)

    def losses(self) -> dict[str, float]:
        sums = self._state.meter.collect().sums
        return {task: sums[f"{task}/loss"] / sums[f"{task}/items"] for task in TASKS}


def _peers(part: Part) -> list[tuple[str, Way, str]]:
    """Names, ways and implementations of attention."""
    tuned = [(f"tuned, {way.buckets} bucket(s), {1 if way.one_backward else 3} backward(s)", way) for way in TUNED]
    peers = [("naive", NAIVE, "sdpa"), *((label, way, "sdpa") for label, way in tuned)]
    if part.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        peers += [(f"{label}, flash_attention_2", way, "flash_attention_2") for label, way in tuned]
    else:
        part.write("flash_attn is not installed, so transformers ran with scaled dot product attention only.", "")
    return peers


def _measure(part: Part, runner: Any, before: float) -> Row:
    """`before`: GiB that were taken before the runner was made."""
    part.free()
    runner.step()
    losses: dict[str, float] = runner.losses()
    seconds: list[float] = []
    for number in range(WARM_UP + (2 if part.tiny else STEPS)):
        part.synchronise()
        started = time.perf_counter()
        runner.step()
        part.synchronise()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return Row(statistics.median(seconds), part.peak() - before, losses)


def _table(part: Part, rows: dict[str, Row]) -> None:
    ours = rows[OURS]
    table = []
    for label, row in rows.items():
        apart = max(abs(row.losses[task] / loss - 1) for task, loss in ours.losses.items())
        ratio = row.seconds / ours.seconds
        table.append((label, f"{1000 * row.seconds:.1f}", f"{ratio:.2f}", f"{row.peak:.2f}", f"{apart:.1e}"))
    part.table(("", "ms a step", "ratio to ours", "peak, GiB", "losses of step 1 differ by"), table)
