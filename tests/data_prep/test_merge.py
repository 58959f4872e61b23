"""Merging keeps every row of the parts, gives the same bytes each time, and refuses parts that do not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.merge import merge
from data_prep.verify import verify
from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.manifest import load_manifest
from tests.data_prep.small import bag, prepare, read_rows, stored, write_rows

LONG = {"en": "A gate. " * 2000, "de": "Ein Tor.", "hu": "Egy kapu."}
NO_LETTERS = {"en": "6:00", "de": "06:00 Uhr", "hu": "6 óra"}


def source(path: str, name: str = "nway.r", **rest: Any) -> dict[str, Any]:
    return {"name": name, "kind": "nway", "format": "jsonl", "path": path} | rest


@pytest.fixture(scope="module")
def parts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Two corpora with a source of the same name, and one source that only the second has."""
    folder, rows = tmp_path_factory.mktemp("parts"), read_rows(corpus.parent)
    found = []
    for name, chosen in (("one", [LONG, *rows[:150]]), ("two", [NO_LETTERS, LONG, *rows[100:200]])):
        (folder / name).mkdir()
        write_rows(folder / name / "r.jsonl", chosen)
        sources = [source("r.jsonl", mono=name == "two")]
        found.append(prepare(folder / name, corpus, sources, name=name, max_tokens=48 if name == "one" else 40))
    return found


def test_a_merged_corpus_has_the_rows_of_its_parts(parts: list[Corpus], tmp_path: Path) -> None:
    merge(tmp_path / "both", [Path(part.path) for part in parts])
    both = Corpus(tmp_path / "both")
    assert verify(both.path) == []
    assert both.manifest.max_tokens == 48
    for of_both in both.sources:
        of_parts = [row for part in parts for row in (stored(part, of_both.name) if _has(part, of_both.name) else [])]
        assert stored(both, of_both.name) == of_parts
        assert of_both.items == len(of_parts)
    assert {s.name for s in both.sources} == {s.name for part in parts for s in part.sources}
    assert len({shard.name for s in both.sources for shard in s.shards}) == sum(len(s.shards) for s in both.sources)
    for reason, count in both.manifest.counts.items():
        assert count == sum(part.manifest.counts.get(reason, 0) for part in parts)
    merged = both.manifest.prep["merged"]
    assert [(one["name"], one["manifest_sha256"]) for one in merged] == [
        (part.manifest.name, part.manifest.sha256) for part in parts
    ]


def test_samples_of_what_was_left_out_are_merged(parts: list[Corpus], tmp_path: Path) -> None:
    merge(tmp_path / "both", [Path(part.path) for part in parts])
    both, one, two = (
        json.loads((f / "samples.json").read_text()) for f in (tmp_path / "both", *(Path(p.path) for p in parts))
    )
    assert both.keys() == one.keys() | two.keys() and both
    for reason, samples in both.items():
        known = [sample["hash"] for sample in (*one.get(reason, []), *two.get(reason, []))]
        assert [sample["hash"] for sample in samples] == sorted(set(known))[:10]


def test_a_merge_is_the_same_bytes_linked_or_copied(
    parts: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("other file system")

    merge(tmp_path / "linked", [Path(part.path) for part in parts])
    monkeypatch.setattr(os, "link", refuse)
    merge(tmp_path / "copied", [Path(part.path) for part in parts])
    contents = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "linked", tmp_path / "copied")
    ]
    assert contents[0] == contents[1]
    shard = load_manifest(tmp_path / "linked").sources[0].shards[0].name
    assert (tmp_path / "linked" / shard).samefile(Path(parts[0].path) / shard)


def test_a_merged_corpus_can_be_merged(corpus: Path, parts: list[Corpus], tmp_path: Path) -> None:
    merge(tmp_path / "both", [Path(part.path) for part in parts])
    merge(tmp_path / "all", [tmp_path / "both", corpus])
    everything = Corpus(tmp_path / "all")
    assert verify(everything.path) == []
    expected = bag(stored(Corpus(tmp_path / "both"), "nway.r"))
    assert bag(stored(everything, "nway.r")) == expected
    assert bag(stored(everything, "nway.rows")) == bag(stored(Corpus(corpus), "nway.rows"))


def test_sources_of_one_name_in_other_languages_are_refused(corpus: Path, tmp_path: Path) -> None:
    folders = []
    for name, row in (("one", {"en": "Open", "de": "Offen"}), ("two", {"en": "Open", "hu": "Nyitva"})):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "r.jsonl", [row])
        folders.append(Path(prepare(tmp_path / name, corpus, [source("r.jsonl")], name=name).path))
    with pytest.raises(UserError, match=r"nway\.r has the languages de en in .*one.* and en hu in .*two.*another name"):
        merge(tmp_path / "both", folders)
    assert not (tmp_path / "both").exists() and not list(tmp_path.glob("*.partial"))


def test_other_tokenizers_are_refused(parts: list[Corpus], tmp_path: Path) -> None:
    other = Path(shutil.copytree(parts[1].path, tmp_path / "other"))
    manifest = load_manifest(other)
    files = tuple(file.model_copy(update={"sha256": file.name}) for file in manifest.tokenizer.files)
    changed = manifest.tokenizer.model_copy(update={"files": files})
    (other / "manifest.json").write_text(manifest.model_copy(update={"tokenizer": changed}).render(), encoding="utf-8")
    with pytest.raises(UserError, match=r"different tokenizers \(tokenizer/tokenizer.json\): prepare one again"):
        merge(tmp_path / "both", [Path(parts[0].path), other])


def test_a_corpus_given_twice_an_existing_folder_and_a_shortened_shard_are_refused(
    parts: list[Corpus], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="given twice"):
        merge(tmp_path / "both", [Path(parts[0].path), Path(parts[0].path)])
    with pytest.raises(UserError, match="exists"):
        merge(tmp_path, [Path(part.path) for part in parts])
    shortened = Path(shutil.copytree(parts[1].path, tmp_path / "shortened"))
    shard = shortened / load_manifest(shortened).sources[0].shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00000\.tar is missing or has another size"):
        merge(tmp_path / "both", [Path(parts[0].path), shortened])


@pytest.mark.parametrize("name", ["samples.json", "nway.r/nway.r.index.npy"])
def test_a_damaged_file_does_not_get_a_new_hash(parts: list[Corpus], tmp_path: Path, name: str) -> None:
    damaged = Path(shutil.copytree(parts[1].path, tmp_path / "damaged"))
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{Path(name).name} is missing or damaged"):
        merge(tmp_path / "both", [Path(parts[0].path), damaged])


def test_the_command_says_that_duplicates_stay(parts: list[Corpus], tmp_path: Path) -> None:
    arguments = ["merge", str(tmp_path / "both"), *(str(part.path) for part in parts)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.output.count("\n") == 1 and "stay in it as often" in done.output


def _has(corpus: Corpus, name: str) -> bool:
    return any(source.name == name for source in corpus.sources)
