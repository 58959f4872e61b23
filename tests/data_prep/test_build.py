"""A corpus holds each id and each row of its text, and counts what was left out."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.build import build
from data_prep.clean import clean
from data_prep.table import SpillWriter, Table
from data_prep.verify import verify
from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.packs import ROWS, text_id
from tests.corpus import write_corpus
from tests.data_prep.small import describe, prepare, read_rows, stored, write_rows
from tests.integration.commands import infoxlm_here


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


def test_a_large_compressed_file_is_one_block_of_many_groups(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows do not wait in memory; the corpus is that of the plain file."""
    source = {"name": "nway.rows", "kind": "nway", "format": "jsonl", "mono": True}
    text = (corpus.parent / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(text)
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(text))
    plain = prepare(tmp_path / "plain", corpus, [source | {"path": "../rows.jsonl"}])
    groups = []
    add = SpillWriter.add

    def counted(spill: SpillWriter, name: str, table: Table) -> None:
        groups.append(name)
        add(spill, name, table)

    for name, value in {"CHUNK": 50, "GROUP": 2**13}.items():
        monkeypatch.setattr(f"data_prep.map.{name}", value)
    monkeypatch.setattr(SpillWriter, "add", counted)
    packed = prepare(tmp_path / "packed", corpus, [source | {"path": "../rows.jsonl.xz"}])
    assert groups.count("nway.rows") > 3
    for one, other in zip(plain.sources, packed.sources, strict=True):
        assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in other.shards]


def test_negatives_are_stored_with_their_rows(corpus: Path, tmp_path: Path) -> None:
    """Cleaned and filtered, in languages of the row, without its own texts, the same twice, and what is held out."""
    text = {"de": "Die Tür ist offen", "en": "The door is open"}
    wrong = {
        "en": [
            "The  window is open",
            "the window is open",
            "THE DOOR IS OPEN",
            "12",
            "The dev set is closed",
            " ".join(f"sentence{chr(letter)}" for letter in range(ord("a"), ord("z"))),
        ],
        "de": ["Das Fenster ist offen"],
        "hu": ["Az ablak nyitva van"],
    }
    lines = [{"text": text, "negatives": wrong}, {"text": {"de": "Das Licht ist aus", "en": "The light is off"}}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "dev.txt").write_text("The dev set is closed\n", encoding="utf-8")
    source = {"name": "nway.rows", "kind": "nway", "format": "jsonl", "path": "rows.jsonl", "mono": True}
    made = prepare(tmp_path, corpus, [source], max_tokens=48, filters={"held_out": {"files": ["dev.txt"]}})
    number = next(i for i, source in enumerate(made.sources) if source.kind == "nway")
    pack, negatives = made.pack(number, 0), made.pack(number, 0).negatives
    languages = made.sources[number].languages
    tokenizer = AutoTokenizer.from_pretrained(made.tokenizer)
    ids = np.split(negatives.ids, np.cumsum(negatives.lengths)[:-1])
    found = {(languages[side], tokenizer.decode(part)) for side, part in zip(negatives.sides, ids, strict=True)}
    assert found == {("en", "The window is open"), ("de", "Das Fenster ist offen")}
    (row,) = set(negatives.rows.tolist())
    assert pack.text_ids[languages.index("en"), row] == text_id("The door is open")
    assert sorted(negatives.text_ids) == sorted(map(text_id, ("The window is open", "Das Fenster ist offen")))
    counts = made.manifest.counts
    assert {name: counts[name] for name in counts if name.startswith("negatives")} == {
        "negatives": 2,
        "negatives_in_languages_that_the_row_lacks": 1,
        "negatives_that_are_right_or_come_twice": 2,
        "negatives_too_long": 1,
    }
    assert {source.name: source.items for source in made.sources} == {"mono.de": 2, "mono.en": 2, "nway.rows": 2}
    assert verify(tmp_path / "corpus") == []


def test_the_same_pairs_in_any_format_are_the_same_rows(corpus: Path, tmp_path: Path) -> None:
    pairs = [{"de": row["de"], "en": row["en"]} for row in read_rows(corpus.parent) if {"de", "en"} <= row.keys()][:50]
    write_rows(tmp_path / "p.jsonl", pairs)
    (tmp_path / "p.tsv").write_text("".join(f"{row['en']}\t{row['de']}\n" for row in pairs), encoding="utf-8")
    (tmp_path / "p.jsonl.xz").write_bytes(lzma.compress((tmp_path / "p.jsonl").read_bytes()))
    for code in ("de", "en"):
        (tmp_path / f"p.{code}").write_text("".join(row[code] + "\n" for row in pairs), encoding="utf-8")
    common = {"name": "para.de-en", "kind": "para"}
    formats: list[dict[str, Any]] = [
        {"format": "jsonl", "path": "../p.jsonl"},
        {"format": "jsonl", "path": "../p.jsonl.xz"},
        {"format": "tsv", "path": "../p.tsv", "languages": ["en", "de"]},
        {"format": "moses", "paths": {"en": "../p.en", "de": "../p.de"}},
    ]
    written = []
    for i, one in enumerate(formats):
        prepare(tmp_path / str(i), corpus, [common | one])
        written.append((tmp_path / str(i) / "corpus" / "para.de-en" / "para.de-en-00000.tar").read_bytes())
    assert len(written) == 4 and len(set(written)) == 1


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
    long = " ".join(f"wort{i}" for i in range(100))
    rows = [
        {"en": "one", "de": "eins", "hu": long},
        {"en": "two", "de": long},
        {"en": "three"},
        {"en": "four", "de": " "},
    ]
    write_rows(tmp_path / "r.jsonl", rows)
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl", "mono": True}
    prepared = prepare(tmp_path, corpus, [source], max_tokens=20, filters={"length_ratio": None})
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
    """`shape`: the number of words of each sentence of each document."""
    folder = tmp_path_factory.mktemp("documents")
    words = iter(range(10**6, 10**7))
    text = [[" ".join(f"w{next(words)}" for _ in range(n)) for n in sentences] for sentences in shape]
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


def test_two_codes_of_a_row_renamed_to_one_keep_the_first_text_and_are_counted(corpus: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one", "pt_BR": "um", "pt_PT": "dois"}])
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl", "mono": True}
    prepared = prepare(tmp_path, corpus, [source], rename={"pt_BR": "pt", "pt_PT": "pt"})
    (row,) = stored(prepared, "nway.r")
    assert row["pt"][1] == text_id("um")
    assert prepared.manifest.counts["sides_of_a_language_the_row_has"] == 1


@pytest.mark.parametrize("code", ["en/US", "../../en", "", "en\n"])
def test_a_language_code_that_cannot_name_a_folder_is_refused(corpus: Path, tmp_path: Path, code: str) -> None:
    write_rows(tmp_path / "r.jsonl", [{code: "one", "de": "eins", "fr": "un"}])
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl", "mono": True}
    with pytest.raises(UserError, match=r"source nway\.r: .* cannot be a language code"):
        prepare(tmp_path, corpus, [source])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.yaml", "r.jsonl"]
    assert prepare(tmp_path / "again", corpus, [source | {"path": "../r.jsonl"}], rename={code: "en"}).languages


def test_a_source_of_which_nothing_is_left_is_left_out_whole(corpus: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"en": "one", "de": "eins"}])
    write_rows(tmp_path / "b.jsonl", [{"fr": "un"}, {"it": "uno"}])
    (tmp_path / "c.jsonl").write_text("", encoding="utf-8")
    sources = [{"name": f"nway.{x}", "kind": "nway", "format": "jsonl", "path": f"{x}.jsonl"} for x in "abc"]
    prepared = prepare(tmp_path, corpus, sources)
    assert [source.name for source in prepared.sources] == ["nway.a"]
    assert prepared.manifest.counts["rows_with_less_than_two_sides"] == 2
    assert verify(prepared.path) == []
    with pytest.raises(UserError, match="no row is left"):
        prepare(tmp_path / "none", corpus, [source | {"path": f"../{source['path']}"} for source in sources[1:]])


def test_half_a_surrogate_pair_is_refused_with_its_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": {"en": "x \\ud83d y", "de": "eins"}}\n', encoding="utf-8")
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}
    with pytest.raises(UserError, match=r"r\.jsonl line 1: the sentence of 'en' has half a surrogate pair"):
        prepare(tmp_path, corpus, [source])


def test_packs_are_full_but_the_last_and_plain_webdataset_reads_them(corpus: Path) -> None:
    opened = Corpus(corpus)
    for number, source in enumerate(opened.sources):
        shards = [str(corpus / shard.name) for shard in source.shards]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
        rows = [opened.pack(number, p).lengths.shape[1] for p in range(source.packs)]
        assert rows == [ROWS] * (source.items // ROWS) + [source.items % ROWS] * bool(source.items % ROWS)
        assert sum(len(sample["ids.npy"]) for sample in samples) == source.tokens
        ours = [opened.pack(number, p).text_ids.T for p in range(source.packs)]
        assert [sample["tid.npy"].tolist() for sample in samples] == [pack[pack > 0].tolist() for pack in ours]


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


def damaged_lines(folder: Path, good: int, bad: int) -> dict[str, Any]:
    rows = [f'{{"text": {{"en": "this is number {i}", "de": "das ist Nummer {i}"}}}}\n' for i in range(good)]
    (folder / "r.jsonl").write_text("".join([*rows, *['{"text": 3}\n'] * bad]), encoding="utf-8")
    return {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}


def test_damaged_lines_may_be_skipped_and_are_counted_with_their_places(corpus: Path, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, corpus, [damaged_lines(tmp_path, 300, 2)], on_error="skip")
    assert prepared.sources[0].items == 300 and prepared.manifest.counts["faults"] == 2
    shown = infoxlm_here("prep", "stat", prepared.path, "--samples", "faults").stdout
    assert "2 texts were left out for faults" in shown and "r.jsonl line 301" in shown
    asked = infoxlm_here("prep", "stat", prepared.path, "--samples", "moon")
    assert asked.returncode == 2 and "only for: faults" in asked.stderr


def test_more_than_one_damaged_line_in_a_hundred_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"5 of 305 rows .* more than 1%.*r\.jsonl line 30\d"):
        prepare(tmp_path, corpus, [damaged_lines(tmp_path, 300, 5)], on_error="skip")


def test_pairs_of_more_than_two_languages_are_refused(corpus: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one door", "de": "eine Tür"}, {"en": "one door", "hu": "egy ajtó"}])
    with pytest.raises(UserError, match=r"source para\.r: kind para has two languages, but the data has de en hu"):
        prepare(tmp_path, corpus, [{"name": "para.r", "kind": "para", "format": "jsonl", "path": "r.jsonl"}])


def test_a_source_that_gives_nothing_is_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "r.jsonl", [{"en": "one door"}])
    lonely = {"name": "nway.lonely", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}
    prepare(tmp_path, corpus, [damaged_lines(tmp_path / "..", 5, 0) | {"path": "../r.jsonl"}, lonely])
    assert "source nway.lonely: nothing is left of it" in capsys.readouterr().err


def test_files_without_a_text_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("")
    source = {"name": "nway.r", "kind": "nway", "format": "jsonl", "path": "r.jsonl"}
    with pytest.raises(UserError, match="the files of all sources are empty"):
        prepare(tmp_path, corpus, [source])
    write_rows(tmp_path / "r.jsonl", [{"en": "1", "de": "2"}])
    with pytest.raises(UserError, match="no text is left after cleaning to train a tokenizer on"):
        build(describe(tmp_path, {"vocab_size": 60}, [source]), tmp_path / "corpus")


def test_a_folder_of_the_user_beside_the_corpus_stays(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.work").mkdir()
    (tmp_path / "corpus.work" / "notes.txt").write_text("mine")
    prepare(tmp_path, corpus, [damaged_lines(tmp_path, 5, 0)])
    assert [path.name for path in (tmp_path / "corpus.work").iterdir()] == ["notes.txt"]


def test_a_dry_run_estimates_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    source = damaged_lines(tmp_path, 4000, 0)
    path = describe(tmp_path, {"vocab_size": 400}, [source])
    shown = infoxlm_here("prep", "build", path, tmp_path / "out" / "corpus", "--dry-run").stdout
    assert "nway.r" in shown and "GB of packs" in shown and "minutes with" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.yaml", "r.jsonl"]


def test_texts_of_held_out_files_are_left_out_and_these_files_are_inputs(corpus: Path, tmp_path: Path) -> None:
    source = damaged_lines(tmp_path, 50, 0)
    (tmp_path / "dev.txt").write_text("This  is number 7\ndas ist nummer 8\n", encoding="utf-8")
    prepared = prepare(tmp_path, corpus, [source], filters={"held_out": {"files": ["dev.txt"]}})
    assert prepared.sources[0].items == 48 and prepared.manifest.counts["held_out"] == 2
    (tmp_path / "dev.txt").write_text("else\n", encoding="utf-8")
    with pytest.raises(UserError, match="another description or other inputs"):
        prepare(tmp_path, corpus, [source], filters={"held_out": {"files": ["dev.txt"]}})


@given(st.text(st.characters()))
@settings(max_examples=500)
def test_cleaning_twice_is_cleaning_once_and_what_is_left_can_be_written(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert clean(text).encode().decode() == clean(text)
    assert clean(text).split() == clean(text).split(" ") or not clean(text)
