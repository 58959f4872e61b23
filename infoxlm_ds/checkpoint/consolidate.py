"""Writes a checkpoint's weights as whole tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

from infoxlm_ds.atomic import new_folder, sync
from infoxlm_ds.checkpoint.files import write_tensors
from infoxlm_ds.checkpoint.store import STATE
from infoxlm_ds.checkpoint.weights import Weights, undamaged
from infoxlm_ds.config import UserError


def consolidate(run: Path, out: Path, step: int | None = None) -> None:
    """Write the weights of a checkpoint (default: the newest) to the new folder `out`. Needs the memory of one
    parameter.

    `model.safetensors`: the fp32 masters; `key_encoder.safetensors`, if the run has a momentum encoder: its fp32
    averages, under the same names; `state.json`. UserError if the checkpoint is missing or damaged, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another folder")
    path = undamaged(run, step)
    masters, averages = Weights(path), Weights(path, "average")
    with new_folder(out) as folder:
        _write(masters, folder / "model.safetensors")
        if keys := len(averages.like):
            _write(averages, folder / "key_encoder.safetensors")
        shutil.copy2(path / STATE, folder)
    print(f"{out}: {path.name}, {len(masters.like)} tensors" + (f", {keys} of the key encoder" if keys else ""))


def _write(weights: Weights, path: Path) -> None:
    with path.open("wb") as file:
        write_tensors(file, weights.like, (weights[name] for name in weights))
    sync(path)
