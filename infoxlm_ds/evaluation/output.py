"""The file of a result: it is tried before anything is measured, so that a wrong path costs no work."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoxlm_ds.atomic import SUFFIX, write_file
from infoxlm_ds.config import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_writable(path: Path | None) -> None:
    """UserError if no file can be written at the `path` of --json. The folder above it is made."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--json {path} is a folder: give the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + SUFFIX)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from None


def write_json(path: Path, content: Any) -> None:
    """Write lists and dictionaries of dataclasses. JSON has no NaN and no infinity: those become null."""
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False, default=_plain) + "\n")


def _plain(row: DataclassInstance) -> dict[str, Any]:
    fields = asdict(row).items()
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in fields}
