"""The files of a corpus folder that its manifest lists, and the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from infoxlm_ds.atomic import write_file
from infoxlm_ds.data.files import File, sha256_of
from infoxlm_ds.data.manifest import NAME, Manifest

SAMPLES = "samples.json"  # texts that were dropped, by reason


def file_of(folder: Path, path: Path) -> File:
    """The manifest's entry of a file in the corpus folder."""
    return File(name=str(path.relative_to(folder)), bytes=path.stat().st_size, sha256=sha256_of(path))


def write_index(folder: Path, source: str, index: np.ndarray) -> File:
    """Write the index of a source, [packs, 6]. Returns its entry."""
    path = folder / source / f"{source}.index.npy"
    np.save(path, index)
    return file_of(folder, path)


def write_samples(folder: Path, samples: dict[str, Any]) -> File:
    """Write the samples of texts that were dropped, by reason. Returns their entry."""
    write_file(folder / SAMPLES, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
    return file_of(folder, folder / SAMPLES)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, when all other files are there. It is on the disk after the call."""
    write_file(folder / NAME, manifest.render(), durable=True)
