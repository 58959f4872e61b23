"""The file of a result is tried before anything is measured, so that a wrong path costs no work."""

from __future__ import annotations

from pathlib import Path

from infoxlm_ds.atomic import SUFFIX
from infoxlm_ds.config import UserError


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
