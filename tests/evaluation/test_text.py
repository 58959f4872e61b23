"""Reading parallel text: which rows are allowed, and which errors name the file and the line."""

import lzma
from pathlib import Path

import pytest

from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.evaluation.text import matches, pairs_with_pivot

ROWS = [
    {"en": "The lamp is on.", "de": "Das Licht ist an.", "ru": "Лампа включена."},
    {"en": "Open the door.", "de": "Öffne die Tür.", "ru": "Откройте дверь."},
    {"de": "Küche", "ru": "Кухня"},
    {"en": "Kitchen", "zh_CN": "WLAN 厨房里的灯已经打开了"},
]


def _read(path: Path) -> list[dict[str, str]]:
    return list(read_nway(path))


def test_plain_and_compressed_files_read_the_same(tmp_path: Path) -> None:
    lines = '{"key": "a", "text": {"en": "Kitchen", "de": "Küche", "fr": " "}}\n' * 2
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    with lzma.open(tmp_path / "rows.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(lines)
    expected = [{"en": "Kitchen", "de": "Küche"}] * 2
    assert _read(tmp_path / "rows.jsonl") == _read(tmp_path / "rows.jsonl.xz") == expected


@pytest.mark.parametrize(
    "line",
    [
        *("not json", '{"key": "b"}', '{"text": ["en"]}', '{"text": {"en": 3}}', '["text"]', '{"text": {"en": "cut'),
        *(r'{"text": {"en": "\ud83d"}}', "[" * 100_000),
    ],
    ids=lambda line: line[:24],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": {"en": "Kitchen"}}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: ") as caught:
        _read(path)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        _read(tmp_path / "none.jsonl")
    whole = lzma.compress(b'{"text": {"en": "Kitchen"}}\n' * 1000)
    (tmp_path / "cut.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.xz line \d+: cannot be read"):
        _read(tmp_path / "cut.xz")
    (tmp_path / "plain.xz").write_text('{"text": {"en": "Kitchen"}}\n')
    with pytest.raises(UserError, match=r"plain\.xz line 1: cannot be read"):
        _read(tmp_path / "plain.xz")


def test_pairs_are_the_rows_that_have_both_sides() -> None:
    german, russian = pairs_with_pivot(ROWS, "en", [], min_pairs=2, source="rows")
    assert (german.language, german.text) == ("de", ["Das Licht ist an.", "Öffne die Tür."])
    assert german.pivot_text == russian.pivot_text == ["The lamp is on.", "Open the door."]


def test_another_script_is_told_from_the_letters() -> None:
    by_language = {pairs.language: pairs for pairs in pairs_with_pivot(ROWS, "en", [], 1, "rows")}
    assert {code: pairs.cross_script for code, pairs in by_language.items()} == {"de": False, "ru": True, "zh_CN": True}
    from_russian = {pairs.language: pairs.cross_script for pairs in pairs_with_pivot(ROWS, "ru", [], 1, "rows")}
    assert from_russian == {"de": True, "en": True}


def test_a_language_is_asked_for_by_code_or_primary_subtag() -> None:
    assert matches("zh_CN", "zh") and matches("zh-Hans", "zh") and matches("zh_CN", "zh_CN") and matches("fil", "fil")
    assert not matches("zh", "zh_CN") and not matches("fil", "fi") and not matches("zh_CN", "zh_TW")
    assert [pairs.language for pairs in pairs_with_pivot(ROWS, "en", ["zh", "ru"], 1, "rows")] == ["ru", "zh_CN"]


def test_no_pivot_and_too_few_pairs_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="rows: no row has the pivot language 'sw'"):
        pairs_with_pivot(ROWS, "sw", [], 1, "rows")
    with pytest.raises(UserError, match="most: de 2, ru 2, zh_CN 1"):
        pairs_with_pivot(ROWS, "en", [], 3, "rows")
