"""The findings of `infoxlm doctor`: printed for people, written as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from infoxlm_ds.atomic import write_file
from infoxlm_ds.trouble import pointer

STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check. `remedy`: what to do about a warning or a failure."""

    check: str
    level: Literal["ok", "warning", "failure"]
    what: str
    remedy: str = ""


def ok(check: str, what: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, remedy: str) -> Finding:
    """A check that found what may harm the run."""
    return Finding(check, "warning", what, remedy)


def failure(check: str, what: str, remedy: str) -> Finding:
    """A check that found what would end the run."""
    return Finding(check, "failure", what, remedy)


def print_findings(findings: Iterable[Finding], console: Console) -> list[Finding]:
    """Print each finding when it comes. Returns all."""
    seen = []
    for finding in findings:
        line = Text.assemble((f"{finding.level:8}", STYLES[finding.level]), f"{finding.check:12}{finding.what}")
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':20}{finding.remedy}{pointer(finding.what)}"), soft_wrap=True)
        seen.append(finding)
    return seen


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """Write the findings. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
