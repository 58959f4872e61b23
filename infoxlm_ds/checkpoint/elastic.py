"""Converts a checkpoint for another number of ranks, to DeepSpeed's universal checkpoint. This is done when it is
needed, and the result is kept."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from infoxlm_ds import dist
from infoxlm_ds.atomic import SUFFIX
from infoxlm_ds.checkpoint.protocol import on_first_rank
from infoxlm_ds.checkpoint.store import Store, collect_receipts, damage_of, universal_of
from infoxlm_ds.config import UserError
from infoxlm_ds.engine.engine import Engine
from infoxlm_ds.engine.files import convert


def suited(path: Path, state: dict[str, Any], engine: Engine) -> Path:
    """The folder to load: the checkpoint itself, or its conversion if the number of ranks changed, or ZeRO's stage from
    1 to 2 or back. Collective. UserError if it cannot be converted."""
    written = state["world_size"], state["zero_stage"]
    wanted = dist.world_size(), engine.stage
    if engine.stage == 0 or written == wanted:
        return path
    if not dist.agree(engine.loads_universal):
        raise UserError(
            f"{path.name} was written by {written[0]} rank(s). DeepSpeed cannot convert it for {wanted[0]} ranks, "
            f"because some of them would hold no part of the model: start {written[0]} ranks, or a number between"
        )
    if problem := on_first_rank(partial(_make_universal, path, written, wanted)):
        raise UserError(f"{problem}: start {written[0]} ranks at ZeRO {written[1]}, as before")
    return universal_of(path)


def _make_universal(path: Path, written: tuple[int, int], wanted: tuple[int, int]) -> str:
    """Convert a checkpoint, unless the conversion exists. `written` and `wanted` are (ranks, stage). Returns what went
    wrong; empty if nothing did."""
    universal = universal_of(path)
    change = "{} was written by {} rank(s) at ZeRO {}; for {} rank(s) at ZeRO {}".format(path.name, *written, *wanted)
    if universal.is_dir() and not damage_of(universal):
        print(f"{change} it was converted before: {universal}", flush=True)
        return ""
    print(f"{change} it is converted ...", flush=True)
    started, unfinished = time.monotonic(), universal.with_name(universal.name + SUFFIX)
    for old in (unfinished, universal):
        shutil.rmtree(old, ignore_errors=True)
    try:
        convert(path, unfinished)
        Store(path.parent.parent).publish(unfinished, collect_receipts(unfinished))
    except Exception as error:  # torch raises RuntimeError on a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        free = shutil.disk_usage(path.parent).free / 2**30
        return f"{change} it cannot be converted ({free:.1f} GiB free): {' '.join(str(error).split())}"
    print(f"... in {time.monotonic() - started:.0f} s, and kept as {universal}", flush=True)
    return ""
