"""The report of `make gpu`: it is written line by line, so that what was found stays when a part ends early."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from infoxlm_ds.planner.speed import known_gpu

GIB = 2**30
FAILED = "**FAILED**"
LINES_OF_A_TRACEBACK = 12


@dataclass
class Part:
    """What a part of the report knows. `tiny`: small sizes, for a test; `until`: when its time is up."""

    path: Path
    device: torch.device
    tiny: bool
    corpus: Path
    until: float
    failed: list[str] = field(default_factory=list)

    def write(self, *lines: str) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.write("", *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)), "")

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        """What is written inside has this title. An exception is written too, and the program goes on after it."""
        self.write("", f"## {title}", "")
        try:
            yield
        except Exception:
            self.failed.append(title)
            self.write(FAILED, *quoted(traceback.format_exc()))

    def before(self, share: float) -> float:
        """A moment that leaves this share of the remaining time."""
        return self.until - share * max(0.0, self.until - time.monotonic())

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back the memory of what was deleted, and start a new peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> float:
        """GiB that tensors take now. 0 on a CPU."""
        return torch.cuda.memory_allocated() / GIB if self.device.type == "cuda" else 0.0

    def peak(self) -> float:
        """The most memory that tensors took since `free`, in GiB. 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else 0.0

    def operations_a_second(self) -> float | None:
        """The device's peak in bf16. None: not known."""
        gpu = known_gpu(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        return None if gpu is None else gpu.peak


def quoted(text: str, lines: int = LINES_OF_A_TRACEBACK) -> list[str]:
    """The last lines of a traceback or log."""
    return ["", "```", *text.strip().splitlines()[-lines:], "```", ""]
