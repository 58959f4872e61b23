"""Saves and loads the whole state of a run. All ranks work together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from infoxlm_ds import dist
from infoxlm_ds.checkpoint.files import Contents, to_host
from infoxlm_ds.checkpoint.fragments import Index, build_index, pack, pieces_of, read_pieces, to_write
from infoxlm_ds.checkpoint.identity import Difference, Identity, differences
from infoxlm_ds.checkpoint.protocol import Failed, Outcome, Save, on_first_rank
from infoxlm_ds.checkpoint.store import (
    FORMAT,
    INDEX,
    STATE,
    OtherFormat,
    Store,
    damage_of,
    read_receipts,
    read_state,
)
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.loader import Cursors
from infoxlm_ds.data.stream import LeftOut
from infoxlm_ds.engine.engine import Engine
from infoxlm_ds.losses.queue import KeyQueue
from infoxlm_ds.model.momentum import MomentumEncoder

PATIENCE = 5.0  # seconds: a process that was killed just now still holds its lock


@dataclass(frozen=True)
class Best:
    """The best probe so far."""

    step: int
    value: float


@dataclass(frozen=True)
class Saved:
    """`step`: optimizer steps applied; `consumed`: steps whose batches were read; `cursors`: the streams' positions;
    `left_out`: draws whose packs are damaged."""

    step: int
    consumed: int
    cursors: Cursors
    left_out: list[LeftOut]
    best: Best | None


@dataclass(frozen=True)
class Found:
    """An undamaged checkpoint to go on from, and the allowed differences between its run and this one."""

    path: Path
    state: dict[str, Any]
    differences: list[Difference]


class Checkpoints:
    """The checkpoints of one run, for all its ranks."""

    def __init__(self, recipe: Recipe) -> None:
        self.store = Store(recipe.run)
        self._settings, self._resume, self._sampling = recipe.checkpoint, recipe.resume, recipe.sampling
        self._measured = _measured(recipe.model_dump(mode="json")["probe"])
        self._under_way: Save | None = None
        self._index: dict[str, Any] | None = None  # the same in each save of this process; empty but on the first rank

    def check(self, identity: Identity) -> bool:
        """Whether the run has done all its steps. Writes nothing. UserError if the folder belongs to another run, or if
        `resume.mode` forbids to start or to go on."""
        run, newest = self.store.run, self.store.latest()
        if newest is None:
            if self._resume.mode == "required":
                raise UserError(
                    f"{run} holds no checkpoint and resume.mode is required: correct `run`, or set resume.mode=auto"
                )
            return False
        if self._resume.mode == "never":
            raise UserError(
                f"{run} holds a run at {newest.name} and resume.mode is never: "
                "take another run folder, or set resume.mode=auto"
            )
        for path in self._candidates():
            try:
                state = read_state(path)
            except OtherFormat:
                raise
            except UserError as error:
                if not self._resume.fallback:
                    raise UserError(f"{error}: {self.remedy()}") from None
                continue
            identity.check(state, run)
            return int(state["step"]) >= identity.recipe.optimizer.steps
        return False  # `find` reports what is wrong with each checkpoint

    def lock(self) -> None:
        """Lock the run folder until this process ends, and remove half-written checkpoints. Collective. UserError if
        another process trains in the folder."""
        holder = on_first_rank(lambda: self.store.acquire(PATIENCE))
        if isinstance(holder, Failed):
            raise UserError(
                f"{self.store.run} cannot be written to or locked ({holder.why}): correct `run` or its permissions, or "
                "take a file system with locks"
            )
        if holder:
            raise UserError(f"{holder} trains in {self.store.run}: wait for it, or take another run folder")

    def find(self, identity: Identity) -> Found | None:
        """The checkpoint to go on from, or None to start. Every byte of it is verified. Collective. UserError if it is
        damaged. With `resume.fallback` it is the newest undamaged one, and the damaged ones are renamed."""
        candidates = dist.from_first_rank(None if dist.rank() else self._candidates())
        assert isinstance(candidates, list)
        damaged: list[str] = []
        for number, path in enumerate(candidates):
            if damage := _damage_seen_by_any(path):
                damaged.append(f"{path}: {damage}")
                continue
            state = read_state(path)
            if number and dist.rank() == 0:
                aside = [self.store.set_aside(bad).name for bad in candidates[:number] if bad.is_dir()]
                self.store.point_to(path)
                kept = f"; the damaged files are kept in {', '.join(aside)}" if aside else ""
                print(f"{'; '.join(damaged)}: going on from {path.name}{kept}", flush=True)
            dist.barrier()
            found = Found(path, state, identity.check(state, self.store.run))
            if dist.rank() == 0 and (changes := _other_cluster(state, identity)):
                print(f"going on from {path.name} with {', '.join(changes)}", flush=True)
            return found
        if damaged:
            raise UserError(f"{'; '.join(damaged)}: {self.remedy()}")
        return None

    def load(self, source: Found, engine: Engine, momentum: MomentumEncoder | None, queue: KeyQueue | None) -> Saved:
        """Load everything from a checkpoint that `find` returned. Any number of ranks may have written it, with any
        engine. Collective. UserError on all ranks if one of them cannot read it, or if a tensor has another shape."""
        path, state = source.path, source.state
        if problem := dist.first_problem(_fill(path, engine, momentum)):
            raise UserError(problem)
        engine.resume(state["counters"], state["step"])
        if momentum is not None:
            momentum.write()
        if queue is not None:
            names = sorted(receipt.name for receipt in read_receipts(path))  # thousands of ranks do not list the folder
            queue.load_state_dicts(load_file(path / n) for n in names if n.startswith("queue-"))
        skipped = any(d.reorders(self._sampling) for d in source.differences)  # the current window holds other items
        cursors = {
            task: {int(lane): (window + 1, 0) if skipped else (window, offset) for lane, (window, offset) in at.items()}
            for task, at in state["cursors"].items()
        }
        comparable = _measured(state["recipe"]["probe"]) == self._measured
        best = Best(**state["best"]) if state["best"] and comparable else None
        left_out = [] if skipped else [LeftOut(*what) for what in state.get("left_out", [])]
        return Saved(state["step"], state["consumed"], cursors, left_out, best)

    def save(
        self, saved: Saved, identity: Identity, engine: Engine, momentum: MomentumEncoder | None, queue: KeyQueue | None
    ) -> None:
        """Start a save. `finish` completes it; if `checkpoint.asynchronous`, calls of `poll` may complete it earlier.
        Collective."""
        assert self._under_way is None
        started = time.monotonic()
        contents = self._contents(saved, identity, engine, momentum, queue)
        if self._settings.asynchronous:
            contents = to_host(contents)
        self._under_way = Save(self.store, self._settings, saved.step, contents, started)

    def poll(self) -> Outcome | None:
        """Advance the current save if the threads of all ranks are done, without waiting for them. Collective while
        there is a save. Returns its outcome when it has ended."""
        save = self._under_way
        if save is None or not dist.agree(save.ready):
            return None
        return self._advance(save)

    def finish(self) -> Outcome | None:
        """Wait for the current save, if there is one, and complete it. Collective."""
        outcome = None
        while (save := self._under_way) is not None:
            outcome = self._advance(save)
        return outcome

    def _contents(
        self,
        saved: Saved,
        identity: Identity,
        engine: Engine,
        momentum: MomentumEncoder | None,
        queue: KeyQueue | None,
    ) -> Contents:
        """This rank's files of a checkpoint. Collective."""
        rank = dist.rank()
        contents, layout = pack(to_write(engine, momentum), list(engine.parameters))
        if queue is not None:
            queue.verify()
            if queue.sharded or rank == 0:
                contents[f"queue-{rank:05d}.safetensors"] = queue.state_dict()
        everyone = dist.gather_objects(saved.cursors)
        if self._index is None:
            layouts = dist.gather_objects(layout)
            self._index = build_index(layouts, engine, momentum).as_json() if rank == 0 else {}
        if rank == 0:
            contents[INDEX] = self._index
            contents[STATE] = identity.as_json() | {
                "format": FORMAT,
                "step": saved.step,
                "consumed": saved.consumed,
                "best": saved.best and vars(saved.best),
                "cursors": _merge(everyone),
                "left_out": saved.left_out,
                "counters": engine.counters(),
                "world_size": dist.world_size(),
            }
        return contents

    def _advance(self, save: Save) -> Outcome | None:
        outcome = save.advance()
        if outcome is not None:
            self._under_way = None
        return outcome

    def _candidates(self) -> list[Path]:
        """The checkpoints to try, newest first: the one that `latest` points to and, with `resume.fallback`, the
        committed ones before it."""
        newest = self.store.latest()
        if newest is None:
            return []
        older = [path for path in reversed(self.store.steps()) if path != newest]
        return [newest, *(older if self._resume.fallback else [])]

    def remedy(self) -> str:
        """What to do about a damaged newest checkpoint."""
        older = [path.name for path in self.store.steps() if path != self.store.latest()]
        before = f"set resume.fallback=true to go on from the one before ({older[-1]}), or " if older else ""
        return f"restore the file, {before}remove {self.store.folder} to start anew"


def _fill(path: Path, engine: Engine, momentum: MomentumEncoder | None) -> str:
    """Fill this rank's fragments from a checkpoint. Returns why that is not possible; empty if it was done."""
    try:
        index = Index.read(path)
        if difference := index.difference(engine, momentum):
            return f"{path} is of another model: {difference}: use the recipe and the files that it began with"
        read_pieces(path, index, pieces_of(engine, momentum))
    except (UserError, OSError, SafetensorError) as error:
        return str(error)
    return ""


def _measured(probe: dict[str, Any] | None) -> dict[str, Any]:
    """What the values of two probes must have in common to be compared."""
    return {key: value for key, value in (probe or {}).items() if key != "every"}


def _other_cluster(state: dict[str, Any], identity: Identity) -> list[str]:
    """What differs in the number of ranks and the engine's configuration, which may always change."""
    then = {"ranks": state["world_size"], "engine": state["engine"]}
    return [str(d) for d in differences(then, {"ranks": dist.world_size(), "engine": identity.engine})]


def _damage_seen_by_any(path: Path) -> str:
    """What is wrong with a committed folder; empty if nothing is. Each rank reads a part of the files. Collective."""
    part = slice(dist.rank(), None, dist.world_size())
    return dist.first_problem(damage_of(path, part))


def _merge(everyone: list[Cursors]) -> Cursors:
    merged: Cursors = {}
    for cursors in everyone:
        for task, lanes in cursors.items():
            merged.setdefault(task, {}).update(lanes)
    return merged
