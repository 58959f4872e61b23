"""Reads a DeepSpeed configuration, and refuses unknown keys, keys that the recipe sets, and values that do not work.

ds_configs/README.md explains it to users.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from infoxlm_ds.config import UserError
from infoxlm_ds.shipped import ENGINES

# DeepSpeed itself ignores unknown top-level keys without a message.
ALLOWED = (
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "comms_logger",
    "wall_clock_breakdown",
)
OURS = {  # keys that the recipe sets, and the recipe's keys
    "train_batch_size": "batch.lanes",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch.lanes and the number of ranks",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.steps and optimizer.warmup",
    "steps_per_print": "log.every",
    "tensorboard": "log.tensorboard",
    "activation_checkpointing": "memory.activation_checkpointing",
}
SECTIONS = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
# Section, key, the only value that works here, why.
ONLY = (
    (
        "zero_optimization",
        "zero_hpz_partition_size",
        1,
        "the momentum encoder cannot reach second copies of the weights",
    ),
    ("zero_optimization", "legacy_stage1", False, "DeepSpeed has removed it"),
    ("zero_optimization", "compute_grad_norm", True, "a step that is not finite would be applied"),
    ("bf16", "check_grad_overflow", True, "a step that is not finite would be applied"),
    ("bf16", "immediate_grad_update", False, "it is untested with the joint pass"),
    ("fp16", "fp16_master_weights_and_grads", False, "the momentum encoder averages fp32 masters"),
    ("bf16", "bf16_master_weights_and_grads", False, "the momentum encoder averages fp32 masters"),
    ("fp16", "auto_cast", False, "a batch holds token ids, which must not be cast"),
)


def load_engine_config(path: Path) -> dict[str, Any]:
    """Read a configuration that comes with the package, by its name, or a JSON file. UserError if a key is unknown, is
    set by the recipe, or has a value that does not work."""
    path = ENGINES.get(str(path), path)
    config = _read(path)
    _check_keys(config, path)
    _check_precision(config, path)
    _check_offload(config, path)
    try:
        DeepSpeedConfig(config | {"train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # what DeepSpeed raises has no common type
        raise UserError(f"{path}: DeepSpeed cannot read it: {' '.join(str(error).split())[:200]}") from None
    return config


def check_device(config: dict[str, Any]) -> None:
    """UserError if this machine cannot run the configuration."""
    if precision_of(config) == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("engine: DeepSpeed runs fp16 on GPUs only: use bf16 or fp32 on this machine")


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3."""
    stage: int = config.get("zero_optimization", {}).get("stage", 0)
    return stage


def precision_of(config: dict[str, Any]) -> str:
    """fp32, bf16 or fp16."""
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled", False)), "fp32")


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """What the model computes in."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision_of(config)]


def summed_in(config: dict[str, Any]) -> str:
    """The precision in which ranks add up gradients. DeepSpeed's own default is that of the weights, which rounds every
    rank's sum to 16 bits before it is sent."""
    precision: str = config.get("communication_data_type", "fp32")
    return precision


def zero_settings(config: dict[str, Any]) -> DeepSpeedZeroConfig:
    """The ZeRO section with DeepSpeed's own defaults filled in."""
    return DeepSpeedZeroConfig(**config.get("zero_optimization", {}))


def offloaded(config: dict[str, Any], part: str) -> bool:
    """Whether the configuration keeps `part`, optimizer or param, in the host's memory."""
    section = config.get("zero_optimization", {}).get(f"offload_{part}") or {}
    return bool(section.get("device", "none") != "none")


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(
            f"engine: no such file: {path}: give a path (in a recipe it is relative to the recipe's folder), or one of "
            f"{', '.join(ENGINES)}"
        ) from None
    except OSError as error:
        raise UserError(f"engine: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"engine: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"engine: {path} is not a JSON object")
    return config


def _check_keys(config: dict[str, Any], path: Path) -> None:
    """UserError for a key that is unknown or that the recipe sets, and for a value that does not work on its own."""
    for key in config:
        if key in OURS:
            raise UserError(f"{path}: remove {key}: the recipe sets it, by {OURS[key]}")
        if key not in ALLOWED:
            raise UserError(f"{path}: {key} is not a known key: one of {', '.join(ALLOWED)}")
    for section in (*SECTIONS, "data_types"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{path}: {section} is not an object of keys and values")
    for section, key, value, why in ONLY:
        if config.get(section, {}).get(key, value) != value:
            raise UserError(f"{path}: remove {section}.{key}: {why}")
    if (stage := stage_of(config)) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage {stage} does not exist: use 0, 1, 2 or 3")
    for section, keys in SECTIONS.items():
        try:
            keys(**config.get(section, {}))
        except ValidationError as error:
            raise UserError(f"{path}: {section}: {_first(error)}") from None


def _check_precision(config: dict[str, Any], path: Path) -> None:
    precision = precision_of(config)
    if all(config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")):
        raise UserError(f"{path}: bf16 and fp16 are both enabled: remove one")
    if unknown := sorted(config.get("data_types", {}).keys() - {"grad_accum_dtype"}):
        raise UserError(f"{path}: remove data_types.{unknown[0]}: only grad_accum_dtype is tested")
    if (summed := config.get("data_types", {}).get("grad_accum_dtype", "fp32")) != "fp32":
        raise UserError(f"{path}: data_types.grad_accum_dtype {summed!r} is not supported: set fp32")
    if precision == "fp32":
        return
    if stage_of(config) == 0:
        raise UserError(
            f"{path}: 16-bit training needs fp32 masters, which stage 0 does not have: set zero_optimization.stage to 1"
        )
    if "grad_accum_dtype" not in config.get("data_types", {}):
        raise UserError(
            f'{path}: 16-bit training must add up gradients in fp32: set "data_types": {{"grad_accum_dtype": "fp32"}}'
        )


def _check_offload(config: dict[str, Any], path: Path) -> None:
    zero = config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"{path}: zero_optimization.{key}.device {device} is not supported: set cpu")
    if offloaded(config, "optimizer") and stage_of(config) == 0:
        raise UserError(f"{path}: offload_optimizer needs ZeRO: set zero_optimization.stage to 1, 2 or 3")
    if offloaded(config, "param") and stage_of(config) != 3:
        raise UserError(f"{path}: offload_param needs zero_optimization.stage 3")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = "is not a known key" if first["type"] == "extra_forbidden" else str(first["msg"])
    return f"{key} {message}".strip()
