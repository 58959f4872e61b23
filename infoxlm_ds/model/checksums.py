"""Hashes of a model folder's files, beside them: weights that were damaged on the way load without a message."""

from __future__ import annotations

import json
from pathlib import Path

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.data.files import inside, sha256_of

CHECKSUMS = "checksums.json"
CHANGED = f"export or copy the folder again, or remove its {CHECKSUMS} if you changed the file"


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of all files in a folder and in its subfolders to CHECKSUMS."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    write_file(folder / CHECKSUMS, json.dumps(hashes, indent=1) + "\n")


def check_checksums(folder: Path, advice: str) -> None:
    """UserError if a file is missing or differs from its hash. A folder without CHECKSUMS is not checked. `advice`:
    what the user can do."""
    path = folder / CHECKSUMS
    try:
        hashes = json.loads(path.read_text(encoding="utf-8"))
        items = [(str(name), str(digest)) for name, digest in hashes.items()]
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} cannot be read: {advice}") from None
    for name, digest in items:
        file = inside(folder, name)
        if not file.is_file() or sha256_of(file) != digest:
            raise UserError(f"{file} {'differs from what was written' if file.is_file() else 'is missing'}: {advice}")
