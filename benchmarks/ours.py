"""Our whole training step on the batches of a case: under DeepSpeed, and on torch alone."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import Work
from infoxlm_ds.build import build, check_inputs
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.data.flat_batch import FlatBatch
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.model.momentum import momentum_at
from infoxlm_ds.objective import TASKS, Objective
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import train_step


class Ours:
    """The trainer's own step."""

    def __init__(self, work: Work, rank: int, world: int, plain: bool = False) -> None:
        start_ranks()
        self._folder = tempfile.TemporaryDirectory(prefix="infoxlm-")
        run = Path(self._folder.name)
        (run / "model").mkdir()
        inputs = check_inputs(work.recipe.model_copy(update={"run": run}), rank, world)
        state = build(replace(inputs, corpus=work.corpus))
        if plain:
            on_torch_alone(state, work.model)
        lanes = work.recipe.batch.lanes_of(rank, world)
        loader: Any = FixedLanes(work.batches, lanes)
        state.loader = loader
        if state.queue is not None and work.queue is not None:
            state.queue.push(Keys(work.queue.vectors, work.queue.ids), 0)
        self.state = state

    def step(self) -> None:
        assert train_step(self.state)

    def losses(self) -> dict[str, float]:
        """The mean losses of the steps since the last call."""
        sums = self.state.meter.collect().sums
        return {task: sums[f"{task}/loss"] / sums[f"{task}/items"] for task in TASKS if f"{task}/loss" in sums}

    def operations(self) -> float:
        """Floating-point operations of the matrix products of a step."""
        with _Products() as products:
            self.step()
        return products.operations

    def rate(self) -> float:
        """The best rate of a large matrix product on this machine, in operations a CPU second."""
        rates = []
        for rows, inner, columns in ((1024, 384, 1536), (1024, 1536, 384), (2048, 2048, 2048)):
            a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
            repeats = int(4e9 / (2 * rows * inner * columns)) + 1
            for _ in range(4):
                start = time.process_time()
                for _ in range(repeats):
                    torch.mm(a, b, out=out)
                rates.append(2 * rows * inner * columns * repeats / (time.process_time() - start))
        return max(rates)


class FixedLanes:
    """Gives batches that were made before, in turn. It stands for the loader."""

    def __init__(self, batches: list[list[JointBatch]], lanes: list[int]) -> None:
        self.lanes, self._batches, self._step = lanes, batches, 0

    def __next__(self) -> list[JointBatch]:
        batch = self._batches[self._step % len(self._batches)]
        self._step += 1
        return [batch[lane] for lane in self.lanes]


def on_torch_alone(state: TrainState, model: Any) -> None:
    """Replace the engine and the momentum encoder of a fresh state by the least that one rank needs in fp32."""
    recipe = state.recipe
    model = copy.deepcopy(model)
    state.objective = Objective(recipe, model, recipe.batch.lanes)
    engine: Any = PlainEngine(state.objective, recipe.optimizer.learning_rate, recipe.optimizer.clip, recipe)
    state.engine = engine
    if state.momentum is not None:
        momentum: Any = PlainMomentum(model.sentence_encoder, recipe.contrast.momentum)
        state.momentum = momentum


class PlainEngine:
    """AdamW, clipping, and nothing else."""

    loss_scale, adapts_loss_scale, stage = 1.0, False, 0

    def __init__(self, module: nn.Module, learning_rate: float, clip: float, recipe: Any) -> None:
        self._module, self._clip, self._left = module, clip, recipe.batch.lanes
        self._lanes, settings = recipe.batch.lanes, recipe.optimizer
        self._parameters = list(module.parameters())
        self._adamw = torch.optim.AdamW(
            self._parameters,
            lr=learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def forward(self, *arguments: Any) -> Any:
        return self._module(*arguments)

    def backward(self, share: Tensor) -> None:
        share.backward()

    def step(self, done: int) -> bool:
        self._left -= 1
        if self._left:
            return False
        self._left = self._lanes
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        if not math.isfinite(float(norm)):
            return False
        self._adamw.step()
        self._adamw.zero_grad()
        return True


class PlainMomentum:
    """The key encoder as a plain average in place."""

    def __init__(self, source: Callable[[], nn.Module], schedule: Any) -> None:
        self._encoder = copy.deepcopy(source()).eval().requires_grad_(False)
        self._keys, self._queries = list(self._encoder.parameters()), list(source().parameters())
        self._schedule = schedule

    @torch.no_grad()
    def encode(self, batch: FlatBatch) -> Tensor:
        out: Tensor = self._encoder(batch)
        return out

    @torch.no_grad()
    def update(self, number: int) -> None:
        torch._foreach_lerp_(list(self._keys), list(self._queries), 1 - momentum_at(self._schedule, number))


class _Products(TorchDispatchMode):
    """Counts the operations of matrix products. torch's own counter knows neither products in place nor the CPU's
    attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm"):
            self.operations += 2.0 * args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.operations += 2.0 * args[1].numel() * args[2].shape[-1]
        elif name.startswith("_scaled_dot_product"):
            backward = "backward" in name
            query, key = args[1:3] if backward else args[:2]
            self.operations += (10.0 if backward else 4.0) * query.numel() * key.shape[-2]
        return func(*args, **(kwargs or {}))
