"""Checkpoints that count only when they are whole.

`checkpoints/step-NNNNNNNN/` holds DeepSpeed's shards, `momentum-RRRRR.safetensors` a rank, the queue once
(`queue-RRRRR.safetensors`, a rank where it is sharded) and `state.json`. Everything is written under a temporary name;
when all ranks are done, rank 0 hashes the files into `manifest.json`, renames the folder, and only then points `latest`
at it. What `latest` does not name never happened.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import load_file, save_file

from infoxlm_ds import dist
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.loader import Cursors
from infoxlm_ds.data.manifest import sha256_of
from infoxlm_ds.engine import Engine
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.model.queue import KeyQueue

# What may differ between the start of a run and its continuation. Corpus and engine are known by what is in them,
# wherever they lie; a preset by its values.
FREE = {"preset", "run", "corpus", "engine", "memory", "timeout", "log", "checkpoint", "probe"}


@dataclass(frozen=True)
class Identity:
    """What makes a run this run: its recipe, what is in its engine configuration, the hash of its corpus' manifest."""

    recipe: Recipe
    engine: dict[str, Any]
    corpus: str

    def differences(self, state: dict[str, Any]) -> list[str]:
        """Keys in which the run that wrote `state` was another."""
        then, now = state["recipe"], self.recipe.model_dump(mode="json")
        for recipe in (then, now):
            recipe["contrast"].pop("queue")  # it fills again
        differing = [key for key in now if key not in FREE and now[key] != then.get(key)]
        return differing + [key for key in ("engine", "corpus") if state[key] != getattr(self, key)]


@dataclass
class Saved:
    """Optimizer steps applied, steps' batches consumed, and where the streams stand."""

    step: int
    consumed: int
    cursors: Cursors


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self._keep = run / "checkpoints", keep

    def lock(self) -> None:
        """Hold the run folder until this process ends. Collective. UserError where another process trains in it."""
        if dist.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        held = dist.from_first_rank(_locked(self._lock) if dist.rank() == 0 else None)
        if not held:
            raise UserError(f"another process trains in {self.folder.parent}: wait for it or take another run")

    def latest(self) -> Path | None:
        """The newest committed checkpoint."""
        pointer = self.folder / "latest"
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def latest_for(self, identity: Identity, world: int) -> Path | None:
        """The same, for going on: UserError where it was written by another run or, unless that is finished, by another
        number of ranks."""
        latest = self.latest()
        if latest is None:
            return None
        if not (latest / "state.json").is_file():
            raise UserError(
                f"{self.folder / 'latest'} names {latest.name}, which is gone: restore it or remove {self.folder}"
            )
        state = _state(latest)
        if differing := identity.differences(state):
            raise UserError(
                f"{self.folder.parent} holds a run with another {', '.join(differing)}: "
                "go on with its own recipe, or give this one another run folder"
            )
        if state["world_size"] != world and state["step"] < identity.recipe.optimizer.steps:
            raise UserError(
                f"{latest} was written by {state['world_size']} ranks, not {world}: start as many ranks as then"
            )
        return latest

    def finished(self, steps: int) -> bool:
        """Whether the newest committed checkpoint, which `latest_for` has found whole, is of step `steps` or later."""
        latest = self.latest()
        return latest is not None and _state(latest)["step"] >= steps

    def save(
        self, saved: Saved, identity: Identity, engine: Engine, momentum: MomentumEncoder | None, queue: KeyQueue | None
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
        if queue is not None:
            queue.verify()
            if queue.sharded or dist.rank() == 0:
                save_file(queue.state_dict(), partial / f"queue-{dist.rank():05d}.safetensors")
        everyone = dist.gather_objects(saved.cursors)
        if dist.rank() == 0:
            state = {
                "step": saved.step,
                "consumed": saved.consumed,
                "corpus": identity.corpus,
                "engine": identity.engine,
                "cursors": _merge(everyone),
                "world_size": dist.world_size(),
                "recipe": identity.recipe.model_dump(mode="json"),
            }
            (partial / "state.json").write_text(json.dumps(state, indent=1))
        dist.barrier()
        if dist.rank() == 0:
            self._commit(partial, final)
        dist.barrier()
        return final

    def load(self, path: Path, engine: Engine, momentum: MomentumEncoder | None, queue: KeyQueue | None) -> Saved:
        """Take everything from a committed checkpoint. Collective. UserError where a file of it is damaged."""
        damage = dist.from_first_rank(_damage(path) if dist.rank() == 0 else None)
        if damage:
            raise UserError(
                f"{path}: {damage}: restore the file, or write the name of an older checkpoint into "
                f"{self.folder / 'latest'}"
            )
        state = _state(path)
        engine.load(self.folder, path.name)
        if momentum is not None:
            momentum.load_state_dict(load_file(path / f"momentum-{dist.rank():05d}.safetensors"))
        if queue is not None:
            queue.load_state_dicts(load_file(part) for part in sorted(path.glob("queue-*.safetensors")))
        cursors = {
            task: {int(lane): tuple(at) for lane, at in lanes.items()} for task, lanes in state["cursors"].items()
        }
        return Saved(state["step"], state["consumed"], cursors)

    def _commit(self, partial: Path, final: Path) -> None:
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        for path in files:
            _sync(path)
        manifest = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
        _write_durably(partial / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # never the one `latest` names: a step is saved once
        partial.replace(final)
        _write_durably(self.folder / "latest", final.name)
        for old in sorted(self.folder.glob("step-????????"))[: -self._keep]:
            if old != final:
                shutil.rmtree(old)


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _damage(path: Path) -> str:
    """What is wrong with the files of a committed checkpoint; empty where nothing is."""
    for name, stated in json.loads((path / "manifest.json").read_text()).items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != stated["bytes"] or sha256_of(path / name) != stated["sha256"]:
            return f"{name} differs from what was written"
    return ""


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
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """What was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
