"""A prepared corpus: its manifest, the indices of its sources, and its packs by number. A pack
is 512 tokenised rows."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from concurrent.futures import Future
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np

from infoxlm_ds.config import Place, UserError
from infoxlm_ds.data.files import sha256_of
from infoxlm_ds.data.manifest import Source, load_manifest
from infoxlm_ds.data.packs import Pack, unpack
from infoxlm_ds.data.store import RESTORE, Range, open_store

PACKS_KEPT = 64  # decoded packs in memory: windows of several lanes and streams draw the same ones


class Corpus:
    """A corpus in a folder or on a server: manifest, indices, and packs on demand. `tokenizer`: a folder on this
    host. `pairs`: the two languages of each pair, by its name."""

    def __init__(self, path: Place, look_at_files: bool = True) -> None:
        """UserError if there is no corpus, an index is damaged or, with `look_at_files`, a file is missing, lies
        elsewhere, has another size than in the manifest, or is a damaged part of the tokenizer. Shards are not hashed
        here: each pack is checked when it is read."""
        self.path, self.manifest, self._store = path, load_manifest(path), open_store(path)
        if look_at_files:
            self._store.check(self.manifest.files())
        self.tokenizer = self._tokenizer(look_at_files)
        self.sources = self.manifest.sources
        self.languages = sorted({language for source in self.sources for language in source.languages})
        together = [source.languages for source in self.sources if source.kind != "mono"]
        self.pairs = {f"{a}-{b}": (a, b) for languages in together for a, b in combinations(sorted(languages), 2)}
        self._indices = [self._index(source) for source in self.sources]
        self._first_rows = [np.cumsum(index[:, 3]) - index[:, 3] for index in self._indices]
        self.pack = lru_cache(PACKS_KEPT)(self._read)

    def _read(self, source: int, number: int) -> Pack:
        rows = int(self._indices[source][number, 3])
        return unpack(self._store.read(self._range(source, number)), rows, len(self.sources[source].languages))

    def ahead(self, packs: Iterable[tuple[int, int]]) -> list[Future[dict[int, bytes]]]:
        """Begin to read packs, given as (source, number), of a server. They stay in memory as long as the caller keeps
        the result."""
        return self._store.ahead(self._range(*pack) for pack in packs)

    def _range(self, source: int, number: int) -> Range:
        shard, offset, size, _, _, crc32 = self._indices[source][number].tolist()
        return Range(self.sources[source].shards[shard], offset, size, crc32)

    def first_row(self, source: int, number: int) -> int:
        """The row number, in its source, of a pack's first row."""
        return int(self._first_rows[source][number])

    def _tokenizer(self, hashed: bool) -> Path:
        for file in self.manifest.tokenizer.files:
            path = self._store.copy(file, self.manifest.sha256)
            if hashed and sha256_of(path) != file.sha256:
                raise UserError(f"{path} is damaged: {RESTORE}")
        return self._store.folder(self.manifest.sha256) / "tokenizer"

    def _index(self, source: Source) -> np.ndarray:
        path = self._store.copy(source.index, self.manifest.sha256)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != source.index.sha256:
            raise UserError(f"{path} is damaged: {RESTORE}")
        return np.load(io.BytesIO(data))
