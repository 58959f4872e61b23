"""Verifies a corpus: first the hashes of all files, then the content of the packs against the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from infoxlm_ds.config import Place, UserError
from infoxlm_ds.data.files import File, sha256_of
from infoxlm_ds.data.manifest import NAME, Manifest, NoCorpus, Source, load_manifest
from infoxlm_ds.data.packs import unpack
from infoxlm_ds.data.store import Range, Server, Store, open_store


def verify(corpus: Place) -> list[str]:
    """The problems of a corpus, one line for each; empty if there are none. UserError if it is not a corpus."""
    try:
        manifest = load_manifest(corpus)
    except NoCorpus:
        raise
    except UserError as error:
        return [str(error)]
    store, files = open_store(corpus), {file.name: file for file in manifest.files()}
    problems = _served(Server(corpus), files) if isinstance(corpus, str) else _files(corpus, files)
    if problems:
        return problems
    store.check(files.values())  # also that no link leads elsewhere
    return [line for source in manifest.sources for line in _contents(store, manifest, source)]


def _served(server: Server, expected: dict[str, File]) -> list[str]:
    """Problems of the files of a server, which cannot list others."""
    problems = []
    for name, file in sorted(expected.items()):
        try:
            if server.sha256(file) != file.sha256:
                problems.append(f"{server.where(name)}: differs from what was written")
        except UserError as error:
            problems.append(str(error))
    return problems


def _files(corpus: Path, expected: dict[str, File]) -> list[str]:
    present = {str(path.relative_to(corpus)): path for path in sorted(corpus.rglob("*")) if path.is_file()}
    problems = [f"{corpus / name}: missing" for name in expected.keys() - present.keys()]
    problems += [f"{corpus / name}: not part of the corpus" for name in present.keys() - expected.keys() - {NAME}]
    for name in sorted(expected.keys() & present.keys()):
        if sha256_of(present[name]) != expected[name].sha256:
            problems.append(f"{present[name]}: differs from what was written")
    return sorted(problems)


def _contents(store: Store, manifest: Manifest, source: Source) -> list[str]:
    rows = tokens = 0
    index = np.load(store.copy(source.index, manifest.sha256))
    for shard, offset, size, of_pack, _, crc32 in index.tolist():
        wanted = Range(source.shards[shard], offset, size, crc32)
        try:
            pack = unpack(store.read(wanted), of_pack, len(source.languages))
        except UserError as error:
            return [str(error)]
        rows += pack.lengths.shape[1]
        tokens += len(pack.ids)
        wrong = pack.negatives
        if (int(pack.lengths.sum()), int(wrong.lengths.sum())) != (len(pack.ids), len(wrong.ids)):
            return [f"{store.where(wanted.file.name)}: lengths do not add up to the ids of the pack at byte {offset}"]
    stated = (source.packs, source.items, source.tokens)
    if (len(index), rows, tokens) != stated:
        return [f"{source.name}: packs, items, tokens are {(len(index), rows, tokens)}, the manifest says {stated}"]
    return []
