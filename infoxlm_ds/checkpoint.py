"""Checkpoints that count only when they are whole.

`checkpoints/step-NNNNNNNN/` holds DeepSpeed's shards, `momentum-RRRRR.safetensors` a rank, `queue.safetensors` and
`state.json`.
Everything is written under a temporary name; when all ranks are done, rank 0 hashes the files into `manifest.json`,
renames the
folder, and only then points `latest` at it. What `latest` does not name never happened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from infoxlm_ds import dist
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.loader import Cursors
from infoxlm_ds.engine import Engine
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.model.queue import KeyQueue

# What may differ between the start of a run and its continuation; the corpus is known by its hash, wherever it lies.
FREE = {"run", "corpus", "log", "checkpoint", "probe"}


@dataclass
class Saved:
    """What state.json says, besides the recipe: optimizer steps applied, steps' batches consumed, where the streams
    stand, and the hash of the corpus' manifest."""

    step: int
    consumed: int
    cursors: Cursors
    corpus: str


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self._keep = run / "checkpoints", keep

    def latest(self) -> Path | None:
        """The newest committed checkpoint."""
        pointer = self.folder / "latest"
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def latest_for(self, recipe: Recipe, corpus: str, world: int) -> Path | None:
        """The same, for going on: UserError where it was written with another recipe, corpus or number of ranks."""
        latest = self.latest()
        if latest is not None:
            _check_same_run(latest, _state(latest), recipe, corpus, world)
        return latest

    def save(
        self, saved: Saved, recipe: Recipe, engine: Engine, momentum: MomentumEncoder | None, queue: KeyQueue | None
    ) -> Path:
        """Write and commit. Collective."""
        name = f"step-{saved.step:08d}"
        partial, final = self.folder / f"{name}.partial", self.folder / name
        if dist.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save(self.folder, partial.name)
        if momentum is not None:
            save_file(momentum.state_dict(), partial / f"momentum-{dist.rank():05d}.safetensors")
        everyone = dist.gather_objects(saved.cursors)
        if dist.rank() == 0:
            if queue is not None:
                save_file(queue.state_dict(), partial / "queue.safetensors")
            state = {
                "step": saved.step,
                "consumed": saved.consumed,
                "corpus": saved.corpus,
                "cursors": _merge(everyone),
                "world_size": dist.world_size(),
                "recipe": recipe.model_dump(mode="json"),
            }
            (partial / "state.json").write_text(json.dumps(state, indent=1))
        dist.barrier()
        if dist.rank() == 0:
            self._commit(partial, final)
        dist.barrier()
        return final

    def load(self, path: Path, engine: Engine, momentum: MomentumEncoder | None, queue: KeyQueue | None) -> Saved:
        """Take everything from a committed checkpoint. Collective."""
        state = _state(path)
        engine.load(self.folder, path.name)
        if momentum is not None:
            momentum.load_state_dict(load_file(path / f"momentum-{dist.rank():05d}.safetensors"))
        if queue is not None:
            queue.load_state_dict(load_file(path / "queue.safetensors"))
        cursors = {
            task: {int(lane): tuple(at) for lane, at in lanes.items()} for task, lanes in state["cursors"].items()
        }
        return Saved(state["step"], state["consumed"], cursors, state["corpus"])

    def _commit(self, partial: Path, final: Path) -> None:
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        _write_durably(partial / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # never the one `latest` names: a step is saved once
        partial.replace(final)
        _write_durably(self.folder / "latest", final.name)
        for old in sorted(self.folder.glob("step-????????"))[: -self._keep]:
            if old != final:
                shutil.rmtree(old)


def _check_same_run(path: Path, state: dict[str, Any], recipe: Recipe, corpus: str, world: int) -> None:
    then, now = state["recipe"], recipe.model_dump(mode="json")
    differing = [key for key in now if key not in FREE and now[key] != then.get(key)]
    if state["corpus"] != corpus:
        differing.append("corpus")
    if differing:
        raise UserError(
            f"{path.parent.parent} holds a run with another {', '.join(differing)}: "
            "go on with its own recipe, or give this one another run folder"
        )
    if state["world_size"] != world:
        raise UserError(f"{path} was written by {state['world_size']} ranks, not {world}: start as many ranks as then")


def _state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def _merge(everyone: list[object]) -> Cursors:
    merged: Cursors = {}
    for cursors in everyone:
        assert isinstance(cursors, dict)
        for task, lanes in cursors.items():
            merged.setdefault(task, {}).update(lanes)
    return merged


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
