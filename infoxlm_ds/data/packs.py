"""Packs: 512 tokenised rows as three members of a WebDataset tar. Writing is reproducible, and a pack is read
by its byte range.

Legend: n rows, s sides of a row (languages of the source), T ids.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infoxlm_ds.config import UserError

ROWS = 512
SHARD_BYTES = 256 * 2**20
INDEX_COLUMNS = ("shard", "offset", "size", "rows", "tokens", "crc32")


@dataclass(frozen=True)
class Pack:
    """`ids` uint32 [T]: row by row, the sides of a row in the source's order. `lengths` [s, n] uint16: 0 if the row
    lacks that side. `text_ids` [s, n] uint64."""

    ids: np.ndarray
    lengths: np.ndarray
    text_ids: np.ndarray


@dataclass(frozen=True)
class WrittenShard:
    path: Path
    packs: int


def text_id(text: str) -> int:
    """64-bit hash of the normalised text. Equal texts are never negatives of each other. Never 0,
    which means no text."""
    folded = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().lower()
    return content_id(folded.encode())


def content_id(data: bytes) -> int:
    """64-bit hash, never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def write_source(folder: Path, source: str, packs: Iterator[Pack]) -> tuple[list[WrittenShard], np.ndarray]:
    """Write packs into `folder`/<source>-NNNNN.tar. Returns the shards and the index, int64 [packs, 6]
    (INDEX_COLUMNS)."""
    import webdataset as wds  # imports torch, and a reader of manifests should not wait for that

    folder.mkdir(parents=True)
    shards: list[WrittenShard] = []
    index: list[tuple[int, ...]] = []
    writer = None
    for number, pack in enumerate(packs):
        if writer is None or writer.tarstream.offset > SHARD_BYTES:
            if writer is not None:
                writer.close()
            shards.append(WrittenShard(folder / f"{source}-{len(shards):05d}.tar", 0))
            # mtime is the integer 0: a float adds a header to each member, and the real time would make builds differ.
            writer = wds.TarWriter(str(shards[-1].path), encoder=False, mtime=0)
        start = writer.tarstream.offset
        key = f"{source.replace('.', '_')}-{number:08d}"  # webdataset ends a key at the first dot
        arrays = {"ids.npy": pack.ids, "len.npy": pack.lengths, "tid.npy": pack.text_ids}
        writer.write({"__key__": key} | {name: _npy(array) for name, array in arrays.items()})
        size = writer.tarstream.offset - start
        index.append((len(shards) - 1, start, size, pack.lengths.shape[1], len(pack.ids)))
        shards[-1] = WrittenShard(shards[-1].path, shards[-1].packs + 1)
    if writer is not None:
        writer.close()
    return shards, _with_checksums(shards, np.array(index, dtype=np.int64).reshape(-1, 5))


def read_pack(shard: Path, offset: int, size: int, crc32: int) -> Pack:
    """One pack, by its place in a shard: a slice of a tar is a tar. UserError if its bytes are not
    those that were written."""
    from webdataset.tariterators import tar_file_iterator

    try:
        with shard.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise UserError(
            f"{shard}: cannot be read: {error.strerror}; restore the file or prepare the corpus again"
        ) from None
    if len(data) != size or zlib.crc32(data) != crc32:
        raise UserError(f"{shard}: the pack at byte {offset} is damaged: restore the file or prepare the corpus again")
    members: dict[str, Any] = {m["fname"].split(".", 1)[1]: m["data"] for m in tar_file_iterator(io.BytesIO(data))}
    ids, lengths, text_ids = (np.load(io.BytesIO(members[name])) for name in ("ids.npy", "len.npy", "tid.npy"))
    return Pack(ids, lengths, text_ids)


def _with_checksums(shards: list[WrittenShard], index: np.ndarray) -> np.ndarray:
    checksums = []
    for number, offset, size, _, _ in index:
        with shards[number].path.open("rb") as file:
            file.seek(offset)
            checksums.append(zlib.crc32(file.read(size)))
    return np.column_stack([index, np.array(checksums, dtype=np.int64)])


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()
