"""Packs that are written can be read, by our reader and by webdataset, and every changed bit is detected."""

import hashlib
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.config import UserError
from infoxlm_ds.data.files import File
from infoxlm_ds.data.packs import Negatives, Pack, text_id, unpack, write_shard
from infoxlm_ds.data.store import Range, read_range


def random_packs(count: int, sides: int, rows: int = 7, seed: int = 0, vocabulary: int = 250_000) -> list[Pack]:
    """`count` packs of `rows` rows; of more than two sides, about a quarter are empty."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        lengths = rng.integers(0 if sides > 2 else 1, 5, (sides, rows)).astype(np.uint16)
        ids = rng.integers(4, vocabulary, int(lengths.sum())).astype(np.uint32)
        text_ids = rng.integers(1, 2**63, (sides, rows)).astype(np.uint64)
        made.append(Pack(ids, lengths, np.where(lengths > 0, text_ids, 0).astype(np.uint64)))
    return made


def write(path: Path, packs: list[Pack]) -> list[list[int]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    found: list[list[int]] = write_shard(path, packs, path.stem).tolist()
    return found


def read_all(path: Path, index: list[list[int]], sides: int) -> list[Pack]:
    return [read_pack(path, offset, size, rows, sides, crc32) for offset, size, rows, _, crc32 in index]


def read_pack(path: Path, offset: int, size: int, rows: int, sides: int, crc32: int) -> Pack:
    shard = File(name=path.name, bytes=0, sha256="0" * 64)
    return unpack(read_range(path, Range(shard, offset, size, crc32)), rows, sides)


def same(one: Pack | Negatives, other: Pack | Negatives) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(
        same(a, b) if isinstance(a, Negatives) else a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
    )


def random_negatives(count: int, rows: int, sides: int, seed: int) -> Negatives:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, count).astype(np.uint16)
    return Negatives(
        rows=np.sort(rng.integers(0, rows, count)),
        sides=rng.integers(0, sides, count).astype(np.uint16),
        lengths=lengths,
        text_ids=rng.integers(1, 2**63, count).astype(np.uint64),
        ids=rng.integers(4, 200, int(lengths.sum())).astype(np.uint32),
    )


@given(
    count=st.integers(1, 5),
    sides=st.integers(1, 70),
    rows=st.integers(1, 512),
    seed=st.integers(0, 99),
    vocabulary=st.sampled_from([200, 16_000, 250_000]),
    negatives=st.sampled_from([0, 1, 300]),
)
@settings(max_examples=15, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    sides: int,
    rows: int,
    seed: int,
    vocabulary: int,
    negatives: int,
) -> None:
    path = tmp_path_factory.mktemp("packs") / "mono.x-00000.tar"
    written = [
        replace(pack, negatives=random_negatives(negatives, rows, sides, seed) if negatives else Negatives.none())
        for pack in random_packs(count, sides, rows, seed, vocabulary)
    ]
    index = write(path, written)
    assert [(r, t) for _, _, r, t, _ in index] == [(rows, len(pack.ids)) for pack in written]
    assert all(same(a, b) for a, b in zip(written, read_all(path, index, sides), strict=True))


def test_two_writes_are_byte_equal(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "para.x-00000.tar", random_packs(4, 2))
    one, two = (hashlib.sha256((tmp_path / name / "para.x-00000.tar").read_bytes()).digest() for name in ("one", "two"))
    assert one == two


def test_members_have_no_second_header_and_absent_sides_cost_a_bit(tmp_path: Path) -> None:
    (pack,) = random_packs(1, 40, rows=512)
    ((_, size, *_),) = write(tmp_path / "nway.x-00000.tar", [pack])
    present = int((pack.lengths > 0).sum())
    content = [4 * len(pack.ids), present, 8 * present, 512 * 40 // 8]
    assert size == sum(512 + -(-(nbytes + 128) // 512) * 512 for nbytes in content)


def test_ids_of_a_small_vocabulary_take_two_bytes(tmp_path: Path) -> None:
    (pack,) = random_packs(1, 1, rows=512, vocabulary=60_000)
    ((_, size, *_),) = write(tmp_path / "mono.x-00000.tar", [pack])
    assert size < 2 * len(pack.ids) + 9 * 512 + 4 * 1024


@pytest.mark.parametrize("sides", [2, 5])
def test_plain_webdataset_reads_the_shards(tmp_path: Path, sides: int) -> None:
    """Each sample has ids, and lengths and text ids of the sides that are there."""
    written, path = random_packs(3, sides), tmp_path / "para.x-00000.tar"
    write(path, written)
    samples = list(webdataset.WebDataset([str(path)], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"para_x-00000-{number:05d}" for number in range(3)]
    for pack, sample in zip(written, samples, strict=True):
        present = pack.lengths.T > 0
        assert np.array_equal(sample["ids.npy"], pack.ids)
        assert np.array_equal(sample["len.npy"], pack.lengths.T[present])
        assert np.array_equal(sample["tid.npy"], pack.text_ids.T[present])
        if sides > 2:
            assert np.array_equal(np.unpackbits(sample["has.npy"], axis=1, count=sides), present)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A shard of three packs and the middle one's row of the index."""
    path = tmp_path_factory.mktemp("shard") / "para.x-00000.tar"
    return path, write(path, random_packs(3, 2))[1]


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_anywhere_in_a_pack_stops_the_reader(
    shard: tuple[Path, list[int]], tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    path, (offset, size, rows, _, crc32) = shard
    data = bytearray(path.read_bytes())
    data[offset + int(where * size)] ^= 1 << bit
    damaged = tmp_path_factory.mktemp("damaged") / path.name
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name}.* {offset} "):
        read_pack(damaged, offset, size, rows, 2, crc32)


@pytest.mark.parametrize("cut", [0, 1, 512, 1000])
def test_a_shard_that_was_cut_short_stops_the_reader(shard: tuple[Path, list[int]], tmp_path: Path, cut: int) -> None:
    path, (offset, size, rows, _, crc32) = shard
    (tmp_path / path.name).write_bytes(path.read_bytes()[: offset + cut])
    with pytest.raises(UserError, match=path.name):
        read_pack(tmp_path / path.name, offset, size, rows, 2, crc32)


def test_a_shard_that_is_gone_stops_the_reader(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar"):
        read_pack(tmp_path / "gone.tar", 0, 512, 1, 1, 0)


@given(st.text())
def test_case_width_and_white_space_do_not_change_a_text_id(text: str) -> None:
    spaced = f"\u3000{text} \t"
    assert 0 < text_id(text) < 2**64
    assert text_id(spaced) == text_id(text)
    assert text_id(unicodedata.normalize("NFKC", text)) == text_id(text)


def test_equal_texts_alone_share_a_text_id() -> None:
    assert text_id("Ｏｐｅｎ the\n Door") == text_id("open the door")
    texts = [f"sentence {i}" for i in range(20_000)] + ["", "a b", "ab"]
    assert len({text_id(text) for text in texts}) == len(texts)
