"""The manifest detects every change of itself."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.config import UserError
from infoxlm_ds.data.files import File
from infoxlm_ds.data.manifest import NAME, Manifest, Shard, Source, Tokenizer, load_manifest

MANIFEST = Manifest(
    name="küche",
    max_tokens=96,
    tokenizer=Tokenizer(
        name="unigram",
        vocab_size=900,
        special_ids={"bos": 0, "mask": 899},
        files=(File(name="tokenizer/tokenizer.json", bytes=3, sha256="ab" * 32),),
    ),
    sources=(
        Source(
            name="mono.de",
            kind="mono",
            languages=("de",),
            items=5,
            tokens=50,
            packs=1,
            index=File(name="mono.de/mono.de.index.npy", bytes=9, sha256="cd" * 32),
            shards=(Shard(name="mono.de/mono.de-00000.tar", bytes=10_240, sha256="ef" * 32, packs=1),),
        ),
    ),
    counts={"duplicate_rows": 0},
    prep={"inputs": {"a.txt": "01" * 32}},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAME).write_text(MANIFEST.render(), encoding="utf-8")
    return tmp_path


def test_what_is_rendered_is_loaded(folder: Path) -> None:
    loaded = load_manifest(folder)
    assert loaded == MANIFEST.model_copy(update={"sha256": loaded.sha256})
    assert [file.name for file in loaded.files()] == [
        "tokenizer/tokenizer.json",
        "mono.de/mono.de.index.npy",
        "mono.de/mono.de-00000.tar",
    ]


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_anywhere_is_seen(tmp_path_factory: pytest.TempPathFactory, where: float, bit: int) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    data = bytearray(MANIFEST.render().encode())
    data[int(where * len(data))] ^= 1 << bit
    (folder / NAME).write_bytes(data)
    with pytest.raises(UserError, match=NAME):
        load_manifest(folder)


def test_a_changed_figure_is_seen_even_where_the_text_stays_canonical(folder: Path) -> None:
    path = folder / NAME
    path.write_text(path.read_text(encoding="utf-8").replace('"items": 5', '"items": 6'), encoding="utf-8")
    with pytest.raises(UserError, match="was changed"):
        load_manifest(folder)


def test_another_format_is_named(folder: Path) -> None:
    tree = json.loads((folder / NAME).read_text(encoding="utf-8")) | {"format": 7}
    (folder / NAME).write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match="has format 7, this version reads 3"):
        load_manifest(folder)


def test_a_folder_without_one_says_how_to_make_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="infoxlm prep build"):
        load_manifest(tmp_path / "none")
