"""A prepared corpus: its manifest, the indices of its sources, and its packs by number. A pack
is 512 tokenised rows."""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from pathlib import Path

import numpy as np

from infoxlm_ds.config import UserError
from infoxlm_ds.data.manifest import Source, inside, load_manifest, sha256_of
from infoxlm_ds.data.packs import Pack, read_pack

PACKS_KEPT = 64  # decoded packs in memory: windows of several lanes and streams draw the same ones


class Corpus:
    """A corpus folder: manifest, indices, and packs on demand."""

    def __init__(self, path: Path, look_at_files: bool = True) -> None:
        """UserError if the folder is not a corpus, an index is damaged or, with `look_at_files`, a file is missing,
        lies elsewhere, has another size than in the manifest, or is a damaged part of the tokenizer. Shards are not
        hashed here: each pack is checked when it is read."""
        self.path, self.manifest = path, load_manifest(path)
        for file in self.manifest.files() if look_at_files else ():
            location = inside(path, file.name)
            if not location.is_file():
                raise UserError(f"{location} is missing: restore the file or prepare the corpus again")
            if location.stat().st_size != file.bytes:
                raise UserError(
                    f"{location} has {location.stat().st_size} bytes, not {file.bytes}: "
                    "restore the file or prepare the corpus again"
                )
        for file in self.manifest.tokenizer.files if look_at_files else ():
            if sha256_of(path / file.name) != file.sha256:
                raise UserError(f"{path / file.name} is damaged: restore the file or prepare the corpus again")
        self.sources = self.manifest.sources
        self.languages = sorted({language for source in self.sources for language in source.languages})
        self._indices = [self._index(source) for source in self.sources]
        self._first_rows = [np.cumsum(index[:, 3]) - index[:, 3] for index in self._indices]
        self.pack = lru_cache(PACKS_KEPT)(self._read)

    def _read(self, source: int, number: int) -> Pack:
        shard, offset, size, rows, _, crc32 = (int(x) for x in self._indices[source][number])
        of_source = self.sources[source]
        path = self.path / of_source.shards[shard].name
        return read_pack(path, offset, size, rows, len(of_source.languages), crc32)

    def first_row(self, source: int, number: int) -> int:
        """The row number, in its source, of a pack's first row."""
        return int(self._first_rows[source][number])

    def _index(self, source: Source) -> np.ndarray:
        path = self.path / source.index.name
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != source.index.sha256:
            raise UserError(f"{path} is damaged: restore the file or prepare the corpus again")
        return np.load(io.BytesIO(data))
