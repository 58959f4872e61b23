"""Parallel text in each form that its users download gives the same pairs, and mistakes name the file and the line."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.languages import LANGUAGES, SETS, family, short_code
from infoxlm_ds.evaluation.parallel import read_pairs

GERMAN = [("The lamp is on.", "Das Licht ist an."), ("Open the door.", "Öffne die Tür.")]
RUSSIAN = [("The lamp is on.", "Лампа включена."), ("Kitchen", "Кухня")]


def _lines(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def _pair(folder: Path, name: str, code: str, pivot: str, pairs: list[tuple[str, str]]) -> None:
    folder.mkdir(exist_ok=True)
    _lines(folder / f"{name}.{pivot}", [english for english, _ in pairs])
    _lines(folder / f"{name}.{code}", [other for _, other in pairs])


def _read(path: Path) -> dict[str, list[tuple[str, str]]]:
    (pairs,) = read_pairs([path], "en", [], 1).values()
    return {one.language: list(zip(one.pivot_text, one.text, strict=True)) for one in pairs}


def test_every_form_gives_the_same_pairs(tmp_path: Path) -> None:
    rows = [
        {"en": "The lamp is on.", "de": "Das Licht ist an.", "ru": "Лампа включена."},
        {"en": "Open the door.", "de": "Öffne die Tür."},
        {"en": "Kitchen", "ru": "Кухня"},
    ]
    _lines(tmp_path / "rows.jsonl", [json.dumps({"key": "a", "text": row}) for row in rows])
    table = [
        "id\ten\tde\tru",
        *(f"{i}\t" + "\t".join(row.get(c, "") for c in ("en", "de", "ru")) for i, row in enumerate(rows)),
    ]
    _lines(tmp_path / "rows.tsv", table)
    with lzma.open(tmp_path / "packed.tsv.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(table))
    tatoeba = tmp_path / "tatoeba"
    _pair(tatoeba, "tatoeba.deu-eng", "deu", "eng", GERMAN)
    _pair(tatoeba, "tatoeba.rus-eng", "rus", "eng", RUSSIAN)
    expected = {"de": GERMAN, "ru": RUSSIAN}
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.tsv", tmp_path / "packed.tsv.xz", tatoeba):
        assert _read(path) == expected
    moses = tmp_path / "moses"
    _pair(moses, "OpenSubtitles.de-en", "de", "en", [*GERMAN, ("A line", " ")])  # a blank side is no pair
    assert _read(moses / "OpenSubtitles.de-en.de") == _read(moses / "OpenSubtitles.de-en.en") == {"de": GERMAN}


def test_sources_of_one_folder_are_told_apart_and_rows_are_numbered(tmp_path: Path) -> None:
    _pair(tmp_path, "bible.de-en", "de", "en", GERMAN)
    _pair(tmp_path, "tatoeba.de-en", "de", "en", GERMAN)
    _pair(tmp_path, "tatoeba.en-ru", "ru", "en", RUSSIAN)
    found = read_pairs([tmp_path], "en", [], 1)
    assert list(found) == [str(tmp_path / "bible"), str(tmp_path / "tatoeba")]
    assert [(pairs.language, pairs.rows, pairs.script) for pairs in found[str(tmp_path / "tatoeba")]] == [
        ("de", [0, 1], "LATIN"),
        ("ru", [2, 3], "CYRILLIC"),
    ]


def test_pairs_of_one_prefix_may_be_named_one_by_one(tmp_path: Path) -> None:
    _pair(tmp_path, "tatoeba.deu-eng", "deu", "eng", GERMAN)
    _pair(tmp_path, "tatoeba.rus-eng", "rus", "eng", RUSSIAN)
    names = ("deu-eng.deu", "rus-eng.rus", "deu-eng.eng")  # both sides of a pair are still one pair
    (found,) = read_pairs([tmp_path / f"tatoeba.{name}" for name in names], "en", [], 1).values()
    assert [(one.language, one.text) for one in found] == [
        ("de", [german for _, german in GERMAN]),
        ("ru", [russian for _, russian in RUSSIAN]),
    ]


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no parallel text: expected pairs of files such as tatoeba\.deu-eng\.deu"):
        _read(tmp_path)
    _lines(tmp_path / "a.tsv", ["en\tde", "Kitchen"])
    with pytest.raises(UserError, match=r"a\.tsv line 2: 1 columns, expected 2"):
        _read(tmp_path / "a.tsv")
    _lines(tmp_path / "b.tsv", ["Open the door.\tÖffne die Tür."])
    with pytest.raises(UserError, match=r"b\.tsv line 1: 'Open the door\.' is no language code"):
        _read(tmp_path / "b.tsv")
    _lines(tmp_path / "c.tsv", ["en\tde\tde", "Kitchen\tKüche\tTür"])
    with pytest.raises(UserError, match=r"c\.tsv line 1: 'de' names two columns"):
        _read(tmp_path / "c.tsv")
    _lines(tmp_path / "x.de-en.de", ["Küche"])
    with pytest.raises(UserError, match=r"x\.de-en\.en: no such file: a pair needs both sides"):
        _read(tmp_path / "x.de-en.de")
    _lines(tmp_path / "x.de-en.en", ["Kitchen", "Door"])
    with pytest.raises(UserError, match=r"x\.de-en\.de ends before line 2 of its other side"):
        _read(tmp_path)


def test_codes_have_two_letters_where_there_are_two_and_families() -> None:
    assert [short_code(code) for code in ("deu", "cmn", "pes", "tgl", "swh", "ceb", "en")] == [
        *("de", "zh", "fa", "tl", "sw", "ceb", "en")
    ]
    assert [family(code) for code in ("pt_BR", "cmn", "zh-Hans", "ceb")] == [
        *("Romance", "Sino-Tibetan", "Sino-Tibetan", "other")
    ]
    assert {name: len(codes.split()) for name, codes in SETS.items()} == {"XTREME's 36": 36, "InfoXLM's 14": 14}
    assert all(code in LANGUAGES for codes in SETS.values() for code in codes.split())
