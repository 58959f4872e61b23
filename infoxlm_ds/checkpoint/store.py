"""The folder `RUN/checkpoints`: its files, which checkpoints count, and which process may write. No torch.

    step-00000600/                  a committed checkpoint, complete, with `manifest.json`
    step-00000600.partial/          being written, or left by a run that was killed
    step-00000600.damaged/          a damaged checkpoint, renamed when the run went on from an older one
    step-00000600.removed/          being removed
    latest                          the name of the newest committed checkpoint: only it and older ones count
    lock                            held by the process that writes here

A folder gets its final name only after all its files are on the disk. So a folder with a final name is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from infoxlm_ds.atomic import SUFFIX, sync, write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.data.files import sha256_of

FORMAT = 3  # of state.json and of the files beside it
BEFORE = "570d66d"  # the last revision that reads the formats before
NAME = re.compile(r"step-\d{8,}")
MANIFEST, STATE, INDEX = "manifest.json", "state.json", "index.json"

# What a run that goes on takes from state.json.
STATED = {"recipe", "engine", "zero_stage", "precision", "corpus", "tokenizer", "world_size"}
STATED |= {"step", "consumed", "best", "cursors", "counters"}


class OtherFormat(UserError):
    """A checkpoint that another version of this program reads. It is not damaged."""


@dataclass(frozen=True)
class Receipt:
    """Size and hash of a file when it was written."""

    name: str
    bytes: int
    sha256: str

    def damage(self, folder: Path) -> str:
        """What is wrong with the file now; empty if nothing is."""
        path = folder / self.name
        if not path.is_file():
            return f"{self.name} is missing"
        if (size := path.stat().st_size) != self.bytes:
            return f"{self.name} has {size:,} bytes and not the {self.bytes:,} that were written"
        return "" if sha256_of(path) == self.sha256 else f"{self.name} differs from what was written"


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Store:
    """The checkpoints of one run, on the disk."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self._pointer = self.folder / "latest"
        self._lock: TextIO | None = None

    def acquire(self, patience: float = 0.0) -> str:
        """Lock the folder until this process ends, and remove what was not committed. If another process holds the
        lock for longer than `patience` seconds, return its name; else an empty text."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("a+")
        deadline = time.monotonic() + patience
        while not _locked(lock):
            if time.monotonic() > deadline:
                lock.seek(0)
                return lock.read().strip() or "another process"
            time.sleep(0.1)
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
        self._lock = lock
        self._mend_pointer()
        for suffix in (SUFFIX, ".removed"):
            for left in self.folder.glob(f"step-*{suffix}"):
                shutil.rmtree(left)
        return ""

    def _mend_pointer(self) -> None:
        """Point `latest` at the newest checkpoint if it is no file. What stood in its place is renamed."""
        if self._pointer.is_file() or not self._named():
            return
        newest, aside = self.latest(), ""
        assert newest is not None
        if os.path.lexists(self._pointer):
            kept = self._pointer.rename(self._pointer.with_name(f"latest.damaged-{os.getpid()}"))
            aside = f"; what was there is kept as {kept.name}"
        self.point_to(newest)
        print(f"{self._pointer} was no file: it now names {newest.name}{aside}", flush=True)

    def steps(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        latest = self.latest()
        return sorted((p for p in self._named() if latest is not None and step_of(p) <= step_of(latest)), key=step_of)

    def _named(self) -> list[Path]:
        """Folders with a final name, in no order."""
        return [p for p in self.folder.glob("step-*") if NAME.fullmatch(p.name)]

    def latest(self) -> Path | None:
        """The newest committed checkpoint; its folder may be gone. If there is no file `latest`, the newest that has
        its final name. UserError if `latest` holds no checkpoint's name."""
        if not self._pointer.is_file():
            return self._without_pointer()
        name = self._pointer.read_text(errors="replace").strip()
        if not NAME.fullmatch(name):
            raise UserError(f"{self._pointer} holds {name!r}: write the name of a checkpoint beside it, step-NNNNNNNN")
        return self.folder / name

    def _without_pointer(self) -> Path | None:
        """What counts as the newest if `latest` is no file: the step to which a user has linked it, or else the newest
        folder with a final name, which is whole."""
        named = self._named()
        linked = self._pointer.resolve() if self._pointer.is_dir() else self._pointer
        if linked in [path.resolve() for path in named]:
            return self.folder / linked.name
        return max(named, key=step_of, default=None)

    def advice(self) -> str:
        """One line for a run that failed: its newest checkpoint, and how to go on."""
        newest = self.latest()
        start = f"The newest checkpoint is {newest.name}" if newest else "There is no checkpoint yet"
        return f"{start}: run the same command again to go on"

    def at(self, step: int | None = None) -> Path:
        """The committed checkpoint of a step; without a step, the newest. UserError if there is none."""
        newest = self.latest()
        if newest is None:
            raise UserError(f"{self.run} holds no checkpoint: train there first, or correct the path")
        paths = {step_of(path): path for path in self.steps()}
        if step is not None and step not in paths:
            raise UserError(f"{self.run} holds no checkpoint of step {step}, but of {', '.join(map(str, paths))}")
        return newest if step is None else paths[step]

    def point_to(self, checkpoint: Path) -> None:
        """Make this the newest checkpoint. Atomic."""
        write_file(self._pointer, checkpoint.name, durable=True)

    def begin(self, step: int) -> Path:
        """Make an empty folder for a step's files."""
        partial = self.folder / f"step-{step:08d}{SUFFIX}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, receipts: Iterable[Receipt]) -> Path:
        """Write the manifest of a folder and give it its final name. Its files must be on the disk."""
        files = {r.name: {"bytes": r.bytes, "sha256": r.sha256} for r in receipts}
        manifest = {"sha256": _hash_of(files), "files": files}
        write_file(partial / MANIFEST, json.dumps(manifest, indent=1), durable=True)
        final = partial.with_suffix("")
        if final.exists():  # not committed before, or its run went back to an older checkpoint
            self.remove(final)
        partial.replace(final)
        sync(self.folder)
        return final

    def remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint. Its folder is renamed first: if the process is killed, the next start removes the
        rest."""
        if checkpoint.exists():
            going = checkpoint.with_name(checkpoint.name + ".removed")
            shutil.rmtree(going, ignore_errors=True)
            checkpoint.replace(going)
            shutil.rmtree(going)

    def set_aside(self, damaged: Path) -> Path:
        """Rename a damaged checkpoint, so that it can be inspected and no run loads it. Returns its new path."""
        aside = damaged.with_name(damaged.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        damaged.replace(aside)
        return aside

    def prune(self, keep: int, keep_every: int | None, dry_run: bool = False) -> list[Path]:
        """Remove all committed checkpoints but the newest `keep` and those of a multiple of `keep_every` steps. Returns
        what was removed."""
        old = [p for p in self.steps()[:-keep] if keep_every is None or step_of(p) % keep_every]
        for path in old if not dry_run else []:
            self.remove(path)
        return old


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def read_receipts(folder: Path) -> list[Receipt]:
    """The receipts of a committed folder. UserError if they cannot be read, or if a byte of them was changed."""
    tree = read_json(folder / MANIFEST)
    files = tree.get("files")
    if files is None and STATE in tree:
        raise _other_format(folder, "1 or 2")
    if not isinstance(files, dict) or tree.get("sha256") != _hash_of(files):
        raise changed(folder, MANIFEST)
    try:
        receipts = [Receipt(name, **stated) for name, stated in files.items()]
    except TypeError:
        raise changed(folder, MANIFEST) from None
    if any(Path(receipt.name).name != receipt.name for receipt in receipts):
        raise changed(folder, MANIFEST)
    return receipts


def changed(folder: Path, name: str) -> UserError:
    """The error of a file that is not as it was written."""
    return UserError(f"{folder}: {name} differs from what was written")


def _hash_of(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _other_format(checkpoint: Path, form: object) -> OtherFormat:
    return OtherFormat(
        f"{checkpoint} has format {form}, and this version reads format {FORMAT}: go on with revision {BEFORE} of "
        "infoxlm_ds, or export the weights there and start another run with model.init"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a committed checkpoint. UserError if it is missing, damaged or of another format."""
    stated = {receipt.name: receipt for receipt in read_receipts(checkpoint)}
    if damage := stated[STATE].damage(checkpoint) if STATE in stated else f"{STATE} is missing":
        raise UserError(f"{checkpoint}: {damage}")
    state = read_json(checkpoint / STATE)
    if state.get("format") != FORMAT:
        raise _other_format(checkpoint, state.get("format"))
    if not state.keys() >= STATED:
        raise changed(checkpoint, STATE)
    return state


def damage_of(folder: Path, part: slice = slice(None), seen: Callable[[int], None] = lambda _: None) -> str:
    """The first damage of a committed folder, or of a part of its files; empty if there is none. Calls `seen` with the
    bytes of each file. OtherFormat if another version wrote it."""
    if not folder.is_dir():
        return "the folder is gone"
    try:
        receipts = read_receipts(folder)
    except OtherFormat:
        raise
    except UserError as error:
        return str(error).removeprefix(f"{folder}: ")
    for receipt in receipts[part]:
        if damage := receipt.damage(folder):
            return damage
        seen(receipt.bytes)
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError if the file is missing or is not JSON."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing") from None
    except (ValueError, RecursionError):
        tree = None
    except OSError as error:
        raise UserError(f"{path.parent}: {path.name} cannot be read ({error.strerror})") from None
    if not isinstance(tree, dict):
        raise changed(path.parent, path.name)
    return tree
