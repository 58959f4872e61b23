"""Writes a checkpoint's weights as whole tensors, in files that run no code when they are loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from infoxlm_ds.atomic import new_folder
from infoxlm_ds.checkpoint.files import read_slices
from infoxlm_ds.checkpoint.store import STATE, Store, damage_of, read_state
from infoxlm_ds.config import Recipe, UserError, check
from infoxlm_ds.engine.files import read_weights
from infoxlm_ds.model.pretrained import saved_shape


def consolidate(run: Path, out: Path, step: int | None = None) -> None:
    """Write the weights of a checkpoint (default: the newest) to the new folder `out`.

    `model.safetensors`: the fp32 masters; `key_encoder.safetensors`, if the run has a momentum encoder: its fp32
    averages, under the same names; `state.json`. UserError if the checkpoint is missing or damaged, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: remove it, or write to another folder")
    path = Store(run).at(step)
    if damage := damage_of(path):  # must come before unpickling
        raise UserError(f"{path}: {damage}: choose another with --step")
    weights = {name: x.clone().contiguous() for name, x in read_weights(path).items()}  # tied weights are copied
    keys = _key_weights(path, run)
    with new_folder(out) as folder:
        save_file(weights, folder / "model.safetensors")
        if keys:
            save_file(keys, folder / "key_encoder.safetensors")
        shutil.copy2(path / STATE, folder)
    print(f"{out}: {path.name}, {len(weights)} tensors" + (f", {len(keys)} of the key encoder" if keys else ""))


def _key_weights(path: Path, run: Path) -> dict[str, Tensor]:
    parts = sorted(path.glob("momentum-*.safetensors"))
    if not parts:
        return {}
    recipe = check(Recipe, read_state(path)["recipe"], str(path))
    model = saved_shape(run / "model", recipe.model)
    followed = list(model.sentence_encoder().parameters())
    names = {id(p): f"model.{name}" for name, p in model.named_parameters()}
    values = read_slices(parts, {f"{i}:0": p.numel() for i, p in enumerate(followed)})
    return {names[id(p)]: values[f"{i}:0"].view(p.shape) for i, p in enumerate(followed)}
