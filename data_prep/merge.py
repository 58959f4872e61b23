"""Joins prepared corpora into one, without preparing them again: its shards are those of the parts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus_folder import write_index, write_manifest, write_samples
from data_prep.filters.report import Report
from infoxlm_ds.atomic import new_folder
from infoxlm_ds.config import UserError
from infoxlm_ds.data.files import File, inside, sha256_of
from infoxlm_ds.data.manifest import Manifest, Shard, Source, load_manifest


def merge(out: Path, parts: Sequence[Path]) -> Manifest:
    """Write the corpus `out`, which has the rows of all parts. Sources of the same name become one. Duplicates are not
    dropped. Files are hard-linked where the file system can, else copied. UserError if the parts do not fit together,
    or if a file is missing. Shards are not hashed: `verify` does it."""
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another folder")
    manifests = [load_manifest(part) for part in parts]
    _check(parts, manifests)
    named: dict[str, list[tuple[Path, Source]]] = {}
    for part, manifest in zip(parts, manifests, strict=True):
        for source in manifest.sources:
            named.setdefault(source.name, []).append((part, source))
    with new_folder(out) as folder:
        for file in manifests[0].tokenizer.files:
            _take(parts[0], file, folder / file.name)
        sources = tuple(_join(folder, of_name) for of_name in named.values())
        counts, samples = _report(parts, manifests)
        merged = Manifest(
            name="+".join(manifest.name for manifest in manifests),
            max_tokens=max(manifest.max_tokens for manifest in manifests),
            tokenizer=manifests[0].tokenizer,
            sources=sources,
            samples=write_samples(folder, samples),
            counts=counts,
            prep={"merged": [{"name": m.name, "manifest_sha256": m.sha256, "prep": m.prep} for m in manifests]},
        )
        write_manifest(folder, merged)
    return merged


def _check(parts: Sequence[Path], manifests: list[Manifest]) -> None:
    """UserError if a part is given twice, if tokenizers differ, or if sources of one name cannot become one."""
    if len({manifest.sha256 for manifest in manifests}) < len(manifests):
        raise UserError(f"one of {', '.join(map(str, parts))} is given twice, or is a copy of another: give it once")
    (first, ours), *others = zip(parts, manifests, strict=True)
    for part, manifest in others:
        if differing := sorted(key for key, value in _ids(ours).items() if value != _ids(manifest).get(key)):
            raise UserError(
                f"{first} and {part} have different tokenizers ({', '.join(differing)}): prepare one again with "
                f"tokenizer: {{path: {first / 'tokenizer'}}}"
            )
    seen: dict[str, tuple[Path, Source]] = {}
    for part, manifest in zip(parts, manifests, strict=True):
        for source in manifest.sources:
            before, known = seen.setdefault(source.name, (part, source))
            if known.languages != source.languages:
                raise UserError(
                    f"{source.name} has the languages {' '.join(known.languages)} in {before} and "
                    f"{' '.join(source.languages)} in {part}: give the source another name in the description of one "
                    "and prepare that again"
                )


def _ids(manifest: Manifest) -> dict[str, Any]:
    """What decides how texts become ids. The other files of a tokenizer differ where it was copied."""
    files = {file.name: file.sha256 for file in manifest.tokenizer.files if Path(file.name).name == "tokenizer.json"}
    return files | manifest.tokenizer.model_dump(include={"special_ids", "separators"})


def _join(folder: Path, parts: list[tuple[Path, Source]]) -> Source:
    """The source that has all shards of these sources of one name, and its index."""
    shards: list[Shard] = []
    indices = []
    first = parts[0][1]
    (folder / first.name).mkdir()
    for part, source in parts:
        index = np.load(_undamaged(part, source.index))
        indices.append(index + np.array([len(shards), 0, 0, 0, 0, 0]))
        for shard in source.shards:
            name = f"{first.name}/{first.name}-{len(shards):05d}.tar"
            _take(part, shard, folder / name)
            shards.append(shard.model_copy(update={"name": name}))
    index = write_index(folder, first.name, np.concatenate(indices))
    figures = {key: sum(getattr(source, key) for _, source in parts) for key in ("items", "tokens", "packs")}
    return first.model_copy(update={**figures, "index": index, "shards": tuple(shards)})


def _take(part: Path, file: File, to: Path) -> None:
    """Link or copy a file of a part. UserError if it is missing or has another size."""
    path = inside(part, file.name).resolve()  # a link would be linked itself
    if not path.is_file() or path.stat().st_size != file.bytes:
        raise UserError(f"{path} is missing or has another size: restore it or prepare {part} again")
    to.parent.mkdir(exist_ok=True)
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, to)


def _undamaged(part: Path, file: File) -> Path:
    """The path of a file whose content goes into files of the result."""
    path = inside(part, file.name)
    if not path.is_file() or sha256_of(path) != file.sha256:
        raise UserError(f"{path} is missing or damaged: restore it or prepare {part} again")
    return path


def _report(parts: Sequence[Path], manifests: list[Manifest]) -> tuple[dict[str, int], dict[str, Any]]:
    """Counts and samples of what all parts left out."""
    report = Report(seed=0)  # only texts that are dropped need the seed
    for part, manifest in zip(parts, manifests, strict=True):
        samples = {}
        if manifest.samples is not None:
            samples = json.loads(_undamaged(part, manifest.samples).read_text(encoding="utf-8"))
        report.merge(Report.of_tree(0, {"counts": manifest.counts, "samples": samples}))
    tree = report.tree()
    return tree["counts"], tree["samples"]
