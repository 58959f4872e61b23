"""What a seed keeps on disk while it is trained: its state after the last epoch, and the model of the best one.

`epoch-N/` holds the state after epoch N, `best-N/` the model of the best epoch. A state names the best epoch of its
time, so that a kill between two writes leaves a pair that belongs together.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from infoxlm_ds.atomic import new_folder, write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.engine.engine import Engine
from infoxlm_ds.evaluation.finetune.task_model import TaskModel

TENSORS, PROGRESS = "state.safetensors", "progress.json"


@dataclass
class Progress:
    """`epoch`, `step`: done so far. `dev`: the dev score after each epoch. `best`: the epoch with the best one."""

    epoch: int = 0
    step: int = 0
    dev: list[float] = field(default_factory=list)
    best: int = 0


def save_state(folder: Path, engine: Engine, progress: Progress) -> None:
    """Write the state after an epoch, then remove what it replaces."""
    tensors = {f"{name}/{kind}": x for name, _, values in engine.state() for kind, x in values.items()}
    with new_folder(folder / f"epoch-{progress.epoch}") as new:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, new / TENSORS)
        text = json.dumps(asdict(progress) | {"counters": engine.counters()})
        write_file(new / PROGRESS, text, durable=True)
    for path in folder.iterdir():
        if path.name.startswith(("epoch-", "best-")):
            kept = path.name in (f"epoch-{progress.epoch}", f"best-{progress.best}")
            if not kept:
                shutil.rmtree(path)


def load_state(folder: Path, engine: Engine) -> Progress:
    """Go on from the newest state, if there is one. UserError if it cannot be read."""
    epochs = [int(path.name[6:]) for path in folder.glob("epoch-*") if path.name[6:].isdecimal()]
    if not epochs:
        return Progress()
    path = folder / f"epoch-{max(epochs)}"
    try:
        tensors = load_file(path / TENSORS)
        read = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        counters = read.pop("counters")
        progress = Progress(**read)
        with torch.no_grad():
            for name, _, values in engine.state():
                for kind, x in values.items():
                    x.copy_(tensors[f"{name}/{kind}"].view_as(x))
        engine.resume(counters, progress.step)
    except Exception as error:  # safetensors has its own type
        raise UserError(f"{path} cannot be read ({error}): remove {folder} to train this seed again") from None
    return progress


def save_model(folder: Path, engine: Engine, model: TaskModel, tokenizer: Any) -> None:
    """Write a model folder for transformers, with the fp32 weights."""
    masters = {name: values["master"] for name, _, values in engine.state()}
    weights = {name.removeprefix("model."): x.float().view(engine.shapes[name]).cpu() for name, x in masters.items()}
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as new:
        model.model.save_pretrained(new, state_dict=weights)
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        write_file(new / "config.json", json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
        tokenizer.backend_tokenizer.no_truncation()  # it would save that of its last call
        tokenizer.save_pretrained(new)


@torch.no_grad()
def load_weights(folder: Path, model: TaskModel) -> None:
    """Set the weights that compute from a folder that `save_model` wrote."""
    weights = load_file(folder / "model.safetensors")
    for name, parameter in model.model.named_parameters():
        parameter.copy_(weights[name])
