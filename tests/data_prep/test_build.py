"""A corpus holds the text it was built from: each id, each row, and a count of what was left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.build import build
from data_prep.clean import clean
from infoxlm_ds.config import UserError
from infoxlm_ds.data.packs import ROWS, text_id
from infoxlm_ds.data.reader import Corpus
from tests.corpus import LANGUAGES, write_corpus

ODD = [
    "two  spaces\tand\u00a0others\u3000here",
    "зима 😀😀 x😀y 𐍈 ꙮ ﷽",
    "cafe\u0301 ﬁne Ⅷ ½ ｶﾞ 값 각",
    "a\u200bb \ufeffc \u00ad d \u2581 e",
    "say <mask> and </s> and <s> <pad> <unk>",
]


def describe(folder: Path, tokenizer: dict[str, Any], sources: list[dict[str, Any]], **rest: Any) -> Path:
    tree = {"name": "tiny", "tokenizer": tokenizer, "sources": sources} | rest
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    lines = (json.dumps({"key": str(i), "text": row}, ensure_ascii=False) + "\n" for i, row in enumerate(rows))
    path.write_text("".join(lines), encoding="utf-8")


def prepare(folder: Path, tokenizer: Path, sources: list[dict[str, Any]], **rest: Any) -> Corpus:
    """The corpus of `sources`, with the tokenizer of another one."""
    folder.mkdir(exist_ok=True)
    build(describe(folder, {"path": str(tokenizer / "tokenizer")}, sources, **rest), folder / "corpus")
    return Corpus(folder / "corpus")


def stored(corpus: Corpus, name: str) -> list[dict[str, tuple[list[int], int]]]:
    """All rows of a source: {language: (ids, text id)}."""
    number = next(i for i, source in enumerate(corpus.sources) if source.name == name)
    source = corpus.sources[number]
    rows = []
    for p in range(source.packs):
        pack = corpus.pack(number, p)
        ends = np.cumsum(pack.lengths.T.ravel().astype(int)).reshape(pack.lengths.T.shape).T
        for i in range(pack.lengths.shape[1]):
            sides = [s for s in range(len(source.languages)) if pack.lengths[s, i]]
            parts = {s: pack.ids[ends[s, i] - int(pack.lengths[s, i]) : ends[s, i]].tolist() for s in sides}
            rows.append({source.languages[s]: (parts[s], int(pack.text_ids[s, i])) for s in sides})
    return rows


def bag(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(row, sort_keys=True) for row in rows)


def read_rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [{code: text for code, text in json.loads(line)["text"].items() if code in LANGUAGES} for line in lines]


def test_stored_ids_are_what_the_saved_tokenizer_gives(corpus: Path) -> None:
    auto = AutoTokenizer.from_pretrained(corpus / "tokenizer", local_files_only=True)
    assert type(auto).__name__.startswith("XLMRoberta")
    expected = []
    for row in read_rows(corpus.parent):
        ids = {code: auto(text, add_special_tokens=False)["input_ids"] for code, text in row.items()}
        sides = {code: (ids[code], text_id(row[code])) for code in row if len(ids[code]) <= 48}
        if len(sides) >= 2:
            expected.append(sides)
    assert {code for row in expected for code in row} == set(LANGUAGES)
    assert bag(stored(Corpus(corpus), "nway.rows")) == bag(expected)


def test_the_tokenizer_has_xlm_rs_ids_and_the_size_asked_for(corpus: Path) -> None:
    auto = AutoTokenizer.from_pretrained(corpus / "tokenizer", local_files_only=True)
    assert auto.convert_ids_to_tokens([0, 1, 2, 3, 799]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert len(auto) == Corpus(corpus).manifest.tokenizer.vocab_size == 800
    assert Corpus(corpus).manifest.tokenizer.special_ids == {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 799}


def test_odd_text_gives_the_same_ids_and_never_a_special_token(corpus: Path, tmp_path: Path) -> None:
    auto = AutoTokenizer.from_pretrained(corpus / "tokenizer", local_files_only=True)
    rows = [{"en": text, "de": f"Satz {i}"} for i, text in enumerate(ODD)]
    write_rows(tmp_path / "odd.jsonl", rows)
    odd = {"name": "nway.odd", "kind": "nway", "format": "jsonl", "path": "odd.jsonl"}
    prepared = prepare(tmp_path, corpus, [odd])
    found = {row["en"][1]: row["en"][0] for row in stored(prepared, "nway.odd")}
    for text in ODD:
        wanted = auto(text, add_special_tokens=False)["input_ids"]
        assert found[text_id(text)] == [3 if token in (0, 1, 2, 799) else token for token in wanted]
    assert prepared.manifest.counts["special_tokens_in_text"] == 4  # <unk> is what it says


def test_two_builds_are_byte_equal(corpus: Path, tmp_path: Path) -> None:
    again = write_corpus(tmp_path)
    files = {path.relative_to(corpus): path for path in corpus.rglob("*") if path.is_file()}
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == files.keys()
    assert [name for name, path in files.items() if path.read_bytes() != (again / name).read_bytes()] == []


def test_the_order_of_the_input_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    packs = []
    for name, rows in (("one", read_rows(corpus.parent)), ("two", read_rows(corpus.parent)[::-1])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", rows)
        source = {"name": "nway.rows", "kind": "nway", "format": "jsonl", "path": "rows.jsonl"}
        prepare(tmp_path / name, corpus, [source])
        packs.append((tmp_path / name / "corpus" / "nway.rows" / "nway.rows-00000.tar").read_bytes())
    assert packs[0] == packs[1]


def test_the_same_pairs_in_any_format_are_the_same_rows(corpus: Path, tmp_path: Path) -> None:
    pairs = [{"de": row["de"], "en": row["en"]} for row in read_rows(corpus.parent) if {"de", "en"} <= row.keys()][:50]
    write_rows(tmp_path / "p.jsonl", pairs)
    (tmp_path / "p.tsv").write_text("".join(f"{row['en']}\t{row['de']}\n" for row in pairs), encoding="utf-8")
    for code in ("de", "en"):
        (tmp_path / f"p.{code}").write_text("".join(row[code] + "\n" for row in pairs), encoding="utf-8")
    common = {"name": "para.de-en", "kind": "para"}
    formats: list[dict[str, Any]] = [
        {"format": "jsonl", "path": "../p.jsonl"},
        {"format": "tsv", "path": "../p.tsv", "languages": ["en", "de"]},
        {"format": "moses", "paths": {"en": "../p.en", "de": "../p.de"}},
    ]
    written = []
    for i, one in enumerate(formats):
        prepare(tmp_path / str(i), corpus, [common | one])
        written.append((tmp_path / str(i) / "corpus" / "para.de-en" / "para.de-en-00000.tar").read_bytes())
    assert written[0] == written[1] == written[2]


def test_equal_rows_are_kept_once_and_counted(corpus: Path, tmp_path: Path) -> None:
    row = {"en": "Open the door", "de": "Öffne die Tür"}
    write_rows(
        tmp_path / "r.jsonl", [row, {"en": "Close it", "de": "Schließe sie"}, row, {"en": "OPEN  the door"} | row]
    )
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl", "mono": True}
    prepared = prepare(tmp_path, corpus, [source])
    assert [(s.name, s.items) for s in prepared.sources] == [("nway.r", 2), ("mono.de", 2), ("mono.en", 2)]
    assert prepared.manifest.counts["duplicate_rows"] == 2


def test_long_sides_and_lonely_rows_are_left_out_of_pairs_and_counted(corpus: Path, tmp_path: Path) -> None:
    long = "wort " * 200
    rows = [{"en": "one", "de": "eins", "hu": long}, {"en": "two", "de": long}, {"en": "three"}, {"en": "4", "de": " "}]
    write_rows(tmp_path / "r.jsonl", rows)
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl", "mono": True}
    prepared = prepare(tmp_path, corpus, [source], max_tokens=20)
    (row,) = stored(prepared, "nway.r")
    assert row.keys() == {"en", "de"}
    assert prepared.manifest.counts["sides_too_long"] == 2
    assert prepared.manifest.counts["rows_with_less_than_two_sides"] == 3
    assert sum(len(row["en"][0]) > 0 for row in stored(prepared, "mono.en")) == 4


documents = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=6), min_size=1, max_size=5)


@given(shape=documents, longest=st.integers(5, 40))
@settings(max_examples=6, deadline=None)
def test_documents_become_blocks_of_whole_sentences_and_nothing_is_lost(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, shape: list[list[int]], longest: int
) -> None:
    """`shape`: words of each sentence of each document."""
    folder = tmp_path_factory.mktemp("documents")
    words = iter(range(10**6, 10**7))
    text = [[" ".join(str(next(words)) for _ in range(n)) for n in sentences] for sentences in shape]
    (folder / "d.txt").write_text("\n\n".join("\n".join(one) for one in text) + "\n", encoding="utf-8")
    source = {"name": "mono.en", "kind": "mono", "format": "text", "path": "d.txt", "languages": ["en"]}
    prepared = prepare(folder, corpus, [source], max_tokens=longest)
    auto = AutoTokenizer.from_pretrained(corpus / "tokenizer", local_files_only=True)
    ids = [[auto(sentence, add_special_tokens=False)["input_ids"] for sentence in one] for one in text]
    expected, split = [], 0
    for document in ids:
        block: list[int] = []
        for sentence in document:
            split += len(sentence) > longest
            for start in range(0, len(sentence), longest):
                piece = sentence[start : start + longest]
                if len(block) + len(piece) > longest:
                    expected.append(block)
                    block = []
                block = block + piece
        expected.append(block)
    found = [row["en"][0] for row in stored(prepared, "mono.en")]
    different = {tuple(block) for block in expected}  # parts of long numbers can be equal
    assert sorted(map(tuple, found)) == sorted(different)
    assert prepared.manifest.counts["duplicate_blocks"] == len(expected) - len(different)
    assert prepared.manifest.counts["sentences_split"] == split
    assert prepared.sources[0].tokens == sum(map(len, found))


def test_languages_are_renamed_then_filtered(corpus: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one", "de_DE": "eins", "fr_FR": "un"}])
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}
    prepared = prepare(tmp_path, corpus, [source], rename={"de_DE": "de", "fr_FR": "fr"}, languages=["de", "en"])
    assert prepared.languages == ["de", "en"]


def test_packs_are_full_but_the_last_and_plain_webdataset_reads_them(corpus: Path) -> None:
    opened = Corpus(corpus)
    for number, source in enumerate(opened.sources):
        shards = [str(corpus / shard.name) for shard in source.shards]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
        rows = [sample["len.npy"].shape[1] for sample in samples]
        assert rows == [ROWS] * (source.items // ROWS) + [source.items % ROWS] * bool(source.items % ROWS)
        assert sum(len(sample["ids.npy"]) for sample in samples) == source.tokens
        ours = [opened.pack(number, p).text_ids.tolist() for p in range(source.packs)]
        assert [sample["tid.npy"].tolist() for sample in samples] == ours


def test_a_finished_corpus_is_left_as_it_is(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one", "de": "eins"}])
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}
    prepare(tmp_path, corpus, [source])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    prepare(tmp_path, corpus, [source])
    assert "prepared already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")} == before
    write_rows(tmp_path / "r.jsonl", [{"en": "two", "de": "zwei"}])
    with pytest.raises(UserError, match="another description or other inputs"):
        prepare(tmp_path, corpus, [source])


def test_a_folder_that_is_no_corpus_is_refused_and_kept(corpus: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one", "de": "eins"}])
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="choose another folder"):
        prepare(tmp_path, corpus, [{"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}])
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["thesis.txt"]


def test_a_failed_build_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(
        '{"key": "a", "text": {"en": "one", "de": "eins"}}\n{"text": 3}\n', encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"r\.jsonl line 2"):
        prepare(tmp_path, corpus, [{"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.yaml", "r.jsonl"]


@given(st.text())
@settings(max_examples=500)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert clean(text).split() == clean(text).split(" ") or not clean(text)
