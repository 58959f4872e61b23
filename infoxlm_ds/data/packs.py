"""Packs: 512 tokenised rows as a few members of a WebDataset tar. Writing is reproducible, and a pack is read by its
byte range.

Legend: n rows, s sides of a row (languages of the source), T ids.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROWS = 512
# Members of a tar, by field of `Negatives`.
NEGATIVES = {name: f"neg.{name}.npy" for name in ("rows", "sides", "lengths", "text_ids", "ids")}


@dataclass(frozen=True)
class Negatives:
    """k hard negatives: wrong sentences for rows of a pack, in the order of the rows. `rows`, `sides`, `lengths`,
    `text_ids` [k]: of each, its row, its language (as one of the pack's sides), and as in `Pack`. `ids` uint32: their
    ids, one negative behind the other."""

    rows: np.ndarray
    sides: np.ndarray
    lengths: np.ndarray
    text_ids: np.ndarray
    ids: np.ndarray

    @staticmethod
    def none() -> Negatives:
        """No negatives."""
        return Negatives(*(np.zeros(0, kind) for kind in (np.int64, np.uint16, np.uint16, np.uint64, np.uint32)))

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Pack:
    """`ids` uint32 [T]: row by row, the sides of a row in the source's order. `lengths` [s, n] uint16: 0 if the row
    lacks that side. `text_ids` [s, n] uint64."""

    ids: np.ndarray
    lengths: np.ndarray
    text_ids: np.ndarray
    negatives: Negatives = field(default_factory=Negatives.none)


def text_id(text: str) -> int:
    """64-bit hash of the normalised text. Equal texts are never negatives of each other. Never 0,
    which means no text."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return content_id(" ".join(folded.split()).lower().encode())


def content_id(data: bytes) -> int:
    """64-bit hash, never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def write_shard(path: Path, packs: Iterable[Pack], name: str) -> np.ndarray:
    """Write packs into a new tar; its members' names begin with `name`. Returns offset, size, rows,
    tokens and crc32 of each pack, int64 [packs, 5]: its row of the source's index, without the shard's number before
    it."""
    index = []
    with path.open("w+b") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, pack in enumerate(packs):
            start, key = tar.offset, f"{name.replace('.', '_')}-{number:05d}"  # a key ends at the first dot
            for ending, array in _members(pack).items():
                data = _npy(array)
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            file.flush()
            crc32 = zlib.crc32(os.pread(file.fileno(), tar.offset - start, start))
            index.append((start, tar.offset - start, pack.lengths.shape[1], len(pack.ids), crc32))
    return np.array(index, np.int64).reshape(-1, 5)


def _members(pack: Pack) -> dict[str, np.ndarray]:
    """The arrays on disk, in the smallest types: of each row the sides that it has, and which these are."""
    present = pack.lengths.T > 0
    members = {
        "ids.npy": _narrow(pack.ids),
        "len.npy": _narrow(pack.lengths.T[present]),
        "tid.npy": pack.text_ids.T[present],
    }
    if not present.all():
        members["has.npy"] = np.packbits(present, axis=1)
    if len(pack.negatives):
        members |= {NEGATIVES[name]: _narrow(array) for name, array in vars(pack.negatives).items()}
    return members


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def unpack(data: bytes, rows: int, sides: int) -> Pack:
    """The pack in a slice of a tar, which is a tar."""
    members = _arrays(data)
    present = np.ones((rows, sides), bool)
    if "has.npy" in members:
        present = np.unpackbits(members["has.npy"], axis=1, count=sides).astype(bool)
    lengths, text_ids = np.zeros(present.shape, np.uint16), np.zeros(present.shape, np.uint64)
    lengths[present], text_ids[present] = members["len.npy"], members["tid.npy"]
    negatives = Negatives.none()
    if NEGATIVES["ids"] in members:
        kinds = {name: array.dtype for name, array in vars(negatives).items()}
        negatives = Negatives(**{name: members[NEGATIVES[name]].astype(kind) for name, kind in kinds.items()})
    return Pack(members["ids.npy"].astype(np.uint32), lengths.T, text_ids.T, negatives)


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """The members of a slice of a tar."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {m.name.split(".", 1)[1]: np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar}  # type: ignore[union-attr]


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each run, one run behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
