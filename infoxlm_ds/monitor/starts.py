"""Records each start of a run: on which devices and with which versions. One line of JSON a start, in starts.jsonl."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from infoxlm_ds import dist
from infoxlm_ds.monitor.lines import Lines

STARTS = "starts.jsonl"
PACKAGES = ("infoxlm-ds", "torch", "deepspeed", "transformers")


def environment(step: int) -> dict[str, Any]:
    """Where a run starts after `step`. `device`: the name of this rank's GPU, or cpu."""
    gpu = dist.device().type == "cuda"
    return {
        "step": step,
        "ranks": dist.world_size(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def record_start(run: Path, found: dict[str, Any]) -> None:
    """Add a line. OSError if it cannot be written."""
    with closing(Lines(run / STARTS)) as lines:
        lines.append(f"{json.dumps(found)}\n")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """All starts that can be read, in order. Runs of older versions have none."""
    try:
        lines = (run / STARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            start = json.loads(line)
            found.append(start | {"step": int(start["step"]), "ranks": int(start["ranks"])})
        except (ValueError, KeyError, TypeError):  # half a line, from a kill
            continue
    return found
