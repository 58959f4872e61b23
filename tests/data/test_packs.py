"""Packs that are written can be read, by our reader and by webdataset, and every changed bit is detected."""

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.config import UserError
from infoxlm_ds.data import packs
from infoxlm_ds.data.packs import Pack, read_pack, text_id, write_source


def random_packs(count: int, sides: int, rows: int = 7, seed: int = 0) -> list[Pack]:
    """`count` packs of `rows` rows; about a quarter of the sides are empty."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        lengths = rng.integers(0, 5, (sides, rows)).astype(np.uint16)
        ids = rng.integers(4, 250_000, int(lengths.sum())).astype(np.uint32)
        made.append(Pack(ids, lengths, rng.integers(1, 2**63, (sides, rows)).astype(np.uint64)))
    return made


def read_all(folder: Path, source: str, index: np.ndarray) -> list[Pack]:
    return [read_pack(folder / f"{source}-{s:05d}.tar", o, n, crc) for s, o, n, _, _, crc in index.tolist()]


def same(one: Pack, other: Pack) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@given(count=st.integers(1, 5), sides=st.integers(1, 4), rows=st.integers(1, 512), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, count: int, sides: int, rows: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("packs") / "mono.x"
    written = random_packs(count, sides, rows, seed)
    shards, index = write_source(folder, "mono.x", iter(written))
    assert [shard.packs for shard in shards] == [count]
    assert [(r, t) for _, _, _, r, t, _ in index.tolist()] == [(rows, len(pack.ids)) for pack in written]
    assert all(same(a, b) for a, b in zip(written, read_all(folder, "mono.x", index), strict=True))


def test_a_full_shard_starts_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "SHARD_BYTES", 10_000)
    written = random_packs(9, 2)
    shards, index = write_source(tmp_path / "para.x", "para.x", iter(written))
    assert len(shards) > 2 and sum(shard.packs for shard in shards) == 9
    assert [shard.path.name for shard in shards] == [f"para.x-{i:05d}.tar" for i in range(len(shards))]
    assert all(same(a, b) for a, b in zip(written, read_all(tmp_path / "para.x", "para.x", index), strict=True))


def test_two_writes_are_byte_equal(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_source(tmp_path / name, "para.x", iter(random_packs(4, 2)))
    one, two = (hashlib.sha256((tmp_path / name / "para.x-00000.tar").read_bytes()).digest() for name in ("one", "two"))
    assert one == two


def test_members_have_no_second_header(tmp_path: Path) -> None:
    (pack,) = random_packs(1, 1)
    _, index = write_source(tmp_path / "mono.x", "mono.x", iter([pack]))
    padded = [512 + -(-(array.nbytes + 128) // 512) * 512 for array in (pack.ids, pack.lengths, pack.text_ids)]
    assert int(index[0, 2]) == sum(padded)


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    written = random_packs(3, 2)
    shards, _ = write_source(tmp_path / "para.x", "para.x", iter(written))
    samples = list(webdataset.WebDataset([str(shard.path) for shard in shards], shardshuffle=False).decode())
    found = [Pack(sample["ids.npy"], sample["len.npy"], sample["tid.npy"]) for sample in samples]
    assert len({sample["__key__"] for sample in samples}) == 3
    assert all(same(a, b) for a, b in zip(written, found, strict=True))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A shard of three packs and the middle one's row of the index."""
    folder = tmp_path_factory.mktemp("shard") / "para.x"
    shards, index = write_source(folder, "para.x", iter(random_packs(3, 2)))
    return shards[0].path, index[1].tolist()


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_anywhere_in_a_pack_stops_the_reader(
    shard: tuple[Path, list[int]], tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    path, (_, offset, size, _, _, crc32) = shard
    data = bytearray(path.read_bytes())
    data[offset + int(where * size)] ^= 1 << bit
    damaged = tmp_path_factory.mktemp("damaged") / path.name
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name}.* {offset} "):
        read_pack(damaged, offset, size, crc32)


@pytest.mark.parametrize("cut", [0, 1, 512, 1000])
def test_a_shard_that_was_cut_short_stops_the_reader(shard: tuple[Path, list[int]], tmp_path: Path, cut: int) -> None:
    path, (_, offset, size, _, _, crc32) = shard
    (tmp_path / path.name).write_bytes(path.read_bytes()[: offset + cut])
    with pytest.raises(UserError, match=path.name):
        read_pack(tmp_path / path.name, offset, size, crc32)


def test_a_shard_that_is_gone_stops_the_reader(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar"):
        read_pack(tmp_path / "gone.tar", 0, 512, 0)


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
