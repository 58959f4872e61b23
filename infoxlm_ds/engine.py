"""The only file that knows DeepSpeed: configuration, start, micro-steps, whether a step was applied, fp32 masters.

DeepSpeed traps that this file answers are told in docs/design.md ("The engine").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Before DeepSpeed is imported: it guesses the device at import, with a warning where there is no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.config import Optimizer, UserError
from infoxlm_ds.model.momentum import Fragment

# What a user may set in a ds_configs file. DeepSpeed itself accepts unknown top-level keys in silence.
ALLOWED = {
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "comms_logger",
    "wall_clock_breakdown",
}
OURS = {
    "train_batch_size": "batch.lanes",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch.lanes and the number of ranks",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.steps and optimizer.warmup",
    "steps_per_print": "log.every",
    "tensorboard": "log.tensorboard",
}

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def start_ranks() -> None:
    """Join the ranks of the launcher, or be the only one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.local_rank())
    else:
        # Only inference uses this op; its build takes minutes, and a killed build hangs every later one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def load_engine_config(path: Path) -> dict[str, Any]:
    """A ds_configs JSON, checked: UserError names a key that is unknown, or that the recipe decides."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"engine: no such file: {path}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"engine: {path} is not JSON: {error}") from None
    for key in config:
        if key in OURS:
            raise UserError(f"{path}: remove {key}: the recipe decides it, by {OURS[key]}")
        if key not in ALLOWED:
            raise UserError(f"{path}: {key} is not a known key: one of {', '.join(sorted(ALLOWED))}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    sixteen_bits = config.get("bf16", {}).get("enabled", False)
    if stage not in (0, 1):
        raise UserError(f"{path}: zero_optimization.stage {stage} is not supported: use 0 or 1")
    if stage == 0 and sixteen_bits:
        raise UserError(f"{path}: 16-bit training needs fp32 masters to average: set zero_optimization.stage to 1")
    if sixteen_bits and config.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        raise UserError(
            f'{path}: 16-bit training adds up gradients in fp32: set "data_types": {{"grad_accum_dtype": "fp32"}}'
        )
    assert isinstance(config, dict)
    return config


class Engine:
    """A model under DeepSpeed: `lanes` micro-batches over all ranks make a step."""

    def __init__(self, module: nn.Module, config: dict[str, Any], optimizer: Optimizer, lanes: int) -> None:
        self._recipe, self._lanes = optimizer, lanes
        filled = config | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": lanes // dist.world_size(),
            "gradient_clipping": optimizer.clip,
            "steps_per_print": 10**9,
        }
        adamw = torch.optim.AdamW(
            _groups(module, optimizer.weight_decay),
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._engine, self._adamw, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=filled)
        self.stage: int = config.get("zero_optimization", {}).get("stage", 0)

    def forward(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, share: Tensor) -> None:
        """Backward of one lane's share of the loss. DeepSpeed averages over ranks and micro-steps; shares are to be
        added up."""
        self._engine.backward(share * self._lanes)

    def step(self, done: int) -> bool:
        """After each micro-step. `done`: optimizer steps applied so far. True where this call applied one."""
        for group in self._adamw.param_groups:
            group["lr"] = self._recipe.learning_rate * schedule(done + 1, self._recipe)
        at_boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        return bool(at_boundary and self._engine.was_step_applied())

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step before clipping; nan where DeepSpeed does not tell (stage 0 in fp32)."""
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds another fragment of the fp32 masters."""
        return self.stage > 0 and dist.world_size() > 1

    def masters(self, parameters: Sequence[nn.Parameter]) -> list[Fragment]:
        """This rank's fragments of the fp32 masters of these parameters of the module."""
        if self.stage == 0:
            return [Fragment(i, 0, p.detach().flatten()) for i, p in enumerate(parameters)]
        found = []
        for i, parameter in enumerate(parameters):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # private in 0.19; None: this rank holds nothing of it
            if mapping is not None:
                address = mapping.lp_fragment_address
                found.append(Fragment(i, address.start, mapping.get_hp_fragment().flatten()))
        return found

    def save(self, folder: Path, tag: str) -> None:
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        self._engine.load_checkpoint(str(folder), tag=tag)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The module's weights in a checkpoint folder that `Engine.save` wrote, in fp32 from the masters, on the CPU.

    DeepSpeed's own reader does not know the shards of ZeRO 1 with fp32 gradient sums, so we put the fragments together.
    Its shards are pickles: only read folders that you trust.
    """
    (states,) = (_unpickle(path) for path in checkpoint.glob("*model_states.pt"))
    weights: dict[str, Tensor] = states["module"]
    shards = sorted(checkpoint.glob("*optim_states.pt"), key=_rank)
    fragments: dict[str, list[Tensor]] = {}
    for shard in map(_unpickle, shards):
        optimizer = shard["optimizer_state_dict"]
        groups = zip(optimizer["param_slice_mappings"], optimizer["single_partition_of_fp32_groups"], strict=True)
        for addresses, values in groups:
            for name, address in addresses.items():
                fragments.setdefault(name, []).append(values[address.start : address.start + address.numel])
    weights |= {name: torch.cat(parts).view_as(weights[name]) for name, parts in fragments.items()}
    for alias, name in (states["shared_params"] or {}).items():  # of tied weights one name has a master; stage 0: none
        weights[alias] = weights[name]
    return weights


def _rank(shard: Path) -> int:
    return int(shard.name.split("pp_rank_")[1].split("_")[0])


def _unpickle(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return state


def schedule(step: int, recipe: Optimizer) -> float:
    """Factor of the learning rate at step 1, 2, ...: linear warm-up to 1 at `warmup`, then linear decay to 0 after the
    last."""
    if step <= recipe.warmup:
        return step / recipe.warmup
    return max(0.0, (recipe.steps + 1 - step) / (recipe.steps + 1 - recipe.warmup))


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors (biases, LayerNorms) are not. By shape, for names of tied weights depend on who
    comes first."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
