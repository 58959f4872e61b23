"""The only file that knows DeepSpeed: configuration, start, micro-steps, whether a step was applied, fp32 masters.

DeepSpeed traps that this file answers are told in docs/design.md ("The engine").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

# Before DeepSpeed is imported: it guesses the device at import, with a warning where there is no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.utils import safe_get_local_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.config import Optimizer, UserError
from infoxlm_ds.model.momentum import Fragment, write_whole

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

M = TypeVar("M", bound=nn.Module)

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
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage {stage} is not one of ZeRO's: use 0, 1, 2 or 3")
    if config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) != 1:
        raise UserError(
            f"{path}: remove zero_optimization.zero_hpz_partition_size: its second copies of the weights would not "
            "follow the momentum encoder"
        )
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
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU too, without a build
        }
        adamw = torch.optim.AdamW(
            _groups(module, optimizer.weight_decay),
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._engine, self._adamw, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=filled)
        self._config = config
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
        if self.stage == 3:
            return [self._shard(i, p, safe_get_local_fp32_param(p)) for i, p in enumerate(parameters)]
        found = []
        for i, parameter in enumerate(parameters):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # private in 0.19; None: this rank holds nothing of it
            if mapping is not None:
                address = mapping.lp_fragment_address
                found.append(Fragment(i, address.start, mapping.get_hp_fragment().flatten()))
        return found

    def copy(self, module: M) -> M:
        """The same for another module, in the engine's precision and layout, that is not trained."""
        module = module.eval().requires_grad_(False)
        if self.stage == 3:
            # Persistent parameters stay gathered: what `write` puts into a shard would never reach them.
            zero = self._config["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
            untrained = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": zero}
            deepspeed.initialize(model=module, config=self._config | untrained)
            return module
        return module.to(dist.device(), self._engine.get_data_types()[0])

    def write(self, parameters: Sequence[nn.Parameter], fragments: Sequence[Fragment]) -> None:
        """Set parameters of a `copy` from fragments such as `masters` gives. Stage 3 needs no collective: the copy is
        cut into the same shards."""
        if self.stage < 3:
            write_whole(parameters, fragments, self.sharded)
            return
        for f in fragments:
            shard: Tensor = parameters[f.parameter].ds_tensor  # type: ignore[attr-defined]  # stage 3's own
            shard.data[: len(f.values)].copy_(f.values)

    def _shard(self, number: int, parameter: nn.Parameter, values: Tensor) -> Fragment:
        """Stage 3 cuts a parameter into equal parts and pads the last ones."""
        start = dist.rank() * len(values)
        size: int = parameter.ds_numel  # type: ignore[attr-defined]  # stage 3's own
        return Fragment(number, start, values[: max(0, min(len(values), size - start))])

    def save(self, folder: Path, tag: str) -> None:
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        self._engine.load_checkpoint(str(folder), tag=tag)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The module's weights in a checkpoint folder that `Engine.save` wrote, in fp32 from the masters, on the CPU.

    DeepSpeed's own reader knows ZeRO 3, but not the shards of ZeRO 1 with fp32 gradient sums: below 3 we put the
    fragments together. Its shards are pickles: only read folders that you trust.
    """
    if any(checkpoint.glob("zero_pp_rank_*_model_states.pt")):
        whole: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
        return whole
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
