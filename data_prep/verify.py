"""Verifies a corpus: first the hashes of all files, then the content of the packs against the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from infoxlm_ds.config import UserError
from infoxlm_ds.data.manifest import NAME, Manifest, Source, inside, load_manifest, sha256_of
from infoxlm_ds.data.packs import read_pack


def verify(corpus: Path) -> list[str]:
    """The problems of a corpus folder, one line for each; empty if there are none. UserError if it is not a corpus."""
    if not (corpus / NAME).is_file():
        load_manifest(corpus)
    try:
        manifest = load_manifest(corpus)
    except UserError as error:
        return [str(error)]
    problems = _files(corpus, manifest)
    return problems or [line for source in manifest.sources for line in _contents(corpus, source)]


def _files(corpus: Path, manifest: Manifest) -> list[str]:
    expected = {file.name: file for file in manifest.files()}
    present = {str(path.relative_to(corpus)): path for path in sorted(corpus.rglob("*")) if path.is_file()}
    problems = [f"{corpus / name}: missing" for name in expected.keys() - present.keys()]
    problems += [f"{corpus / name}: not part of the corpus" for name in present.keys() - expected.keys() - {NAME}]
    for name in sorted(expected.keys() & present.keys()):
        if sha256_of(present[name]) != expected[name].sha256:
            problems.append(f"{present[name]}: differs from what was written")
    return sorted(problems)


def _contents(corpus: Path, source: Source) -> list[str]:
    rows = tokens = 0
    index = np.load(inside(corpus, source.index.name))
    for shard, offset, size, of_pack, _, crc32 in index.tolist():
        path, sides = inside(corpus, source.shards[shard].name), len(source.languages)
        try:
            pack = read_pack(path, offset, size, of_pack, sides, crc32)
        except UserError as error:
            return [str(error)]
        rows += pack.lengths.shape[1]
        tokens += len(pack.ids)
        if int(pack.lengths.sum()) != len(pack.ids):
            return [
                f"{corpus / source.shards[shard].name}: lengths do not add up to the ids of the pack at byte {offset}"
            ]
    stated = (source.packs, source.items, source.tokens)
    if (len(index), rows, tokens) != stated:
        return [f"{source.name}: packs, items, tokens are {(len(index), rows, tokens)}, the manifest says {stated}"]
    return []
