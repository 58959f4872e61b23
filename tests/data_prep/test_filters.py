"""Each filter drops what is wrong and leaves real text of many scripts; what they count does not depend on order."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import clean
from data_prep.filters.filters import Filters
from data_prep.filters.languages import BLOCKS, are_near, letters, scripts
from data_prep.filters.report import SAMPLES, Report
from data_prep.filters.settings import FilterSettings
from data_prep.rows import Row
from infoxlm_ds.config import UserError

REAL = {
    "en": "The password for your Kumo Cloud account.",
    "de": "Das Passwort für dein Kumo-Cloud-Konto.",
    "ru": "Пароль для вашей учётной записи Kumo Cloud.",
    "el": "Ο κωδικός πρόσβασης για τον λογαριασμό σας στο Kumo Cloud.",
    "ar": "كلمة المرور لحساب Kumo Cloud الخاص بك، رقم ١٢٣",
    "he": "הסיסמה עבור חשבון Kumo Cloud שלך",
    "hi": "आपके खाते का पासवर्ड १२३",
    "th": "รหัสผ่านสำหรับบัญชีของคุณ",
    "zh-Hans": "您的 Kumo Cloud 账户的密码。",
    "zh_TW": "您的帳號密碼。",
    "ja": "あなたのアカウントのパスワード",
    "ko": "Kumo Cloud 계정의 비밀번호",
    "sr": "Лозинка за ваш налог",
    "sr-Latn": "Lozinka za vaš nalog na oblaku",
    "vi": "Mật khẩu cho tài khoản của bạn",
    "dv": "މުޅިން އަލުން ހުށަހަޅާ",
    "xx": "whatever it may be",
}


def apply(texts: dict[str, str], folder: Path = Path(), **settings: Any) -> tuple[dict[str, str], dict[str, int]]:
    report = Report(1)
    kept = Filters(FilterSettings(**settings), folder).row(Row("a line 1", texts), report)
    return kept, dict(report.counts)


def reason(language: str, text: str, folder: Path = Path(), **settings: Any) -> str | None:
    report = Report(1)
    kept = Filters(FilterSettings(**settings), folder).sentence(language, text, "a line 1", report)
    assert (kept is None) == bool(report.counts)
    return next(iter(report.counts), None)


def test_real_text_in_many_scripts_stays() -> None:
    assert apply(REAL) == (REAL, {})


@pytest.mark.parametrize("name", ["Bluetooth", "Wi-Fi 6E", "Home Assistant Operating System"])
def test_names_stay(name: str) -> None:
    texts = {"en": name, "de": name, "ja": name, "ar": name}
    assert apply(texts) == (texts, {})


@pytest.mark.parametrize(
    ("language", "text", "why"),
    [
        ("en", "", "empty"),
        ("fr", "6:00", "letters"),
        ("ckb", ":؟.!", "letters"),
        ("hi", "१२३ — ४५६", "letters"),
        ("zh", "——……——", "letters"),
        ("tr", "هذا الإجراء سيحذف إجمالي صفحة", "script"),
        ("sr-Latn", "Лозинка за ваш налог", "script"),
        ("ko", "計量器のデータを追加します", "script"),
        ("mn", "Ensure this filename has at most %(max)d characters.", "script"),
        ("en", "buy now buy now buy now buy now buy now", "repetition"),
        ("ja", "はい" * 20, "repetition"),
        ("th", "ดี" * 30, "repetition"),
    ],
)
def test_a_wrong_side_goes(language: str, text: str, why: str) -> None:
    assert reason(language, text) == why
    off: dict[str, Any] = {"letters": None, "script": None, "repetition": None}
    assert reason(language, text, **off) == ("empty" if not text else None)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Zähler (0 … 4.294.967.295)"),
        ("vi", "%(value)s tỷ tỷ tỷ tỷ"),
        ("ar", "%(start_index)s-%(end_index)s من %(items_count)s %(model_name)s"),
        ("ja", "粒子数(>2.5μm)"),
        ("ru", "FRITZ!Box Tools"),
        ("hi", "मि॰ की की की है"),
    ],
)
def test_a_right_side_stays(language: str, text: str) -> None:
    assert reason(language, text) is None


def test_a_side_that_is_too_long_goes_and_monolingual_text_stays_to_be_split() -> None:
    long = " ".join(f"word{i}" for i in range(1000))
    assert apply({"en": long, "de": "kurz", "fr": "court"}) == ({"de": "kurz", "fr": "court"}, {"too_long": 1})
    assert "too_long" not in apply({"en": long, "de": long + "."}, max_characters=None)[1]
    assert reason("en", long) is None


def test_a_copy_goes_alone_and_with_its_pair() -> None:
    source = "Enter a username and password."
    assert apply({"en": source, "ml": "enter a Username and password.", "de": "Namen eingeben."}) == (
        {"en": source, "de": "Namen eingeben."},
        {"copy": 1},
    )
    assert apply({"en": source, "ml": source}) == ({}, {"copy": 1})
    assert apply({"en": source, "ml": source}, copied_words=None)[1] == {}
    norwegian = {"nb": "du har ikke tilgang her", "da": "du har ikke tilgang her"}
    assert apply(norwegian) == (norwegian, {})


def test_lengths() -> None:
    long = "This license lets others distribute, adapt, and build upon your resource, even commercially."
    assert apply({"en": long, "ha": "Ka saka lamba"}) == ({}, {"length_ratio": 1})
    translated = {"en": long, "zh": "此许可证允许他人分发、改编和再创作您的资源，包括商业用途。"}
    assert apply(translated) == (translated, {})
    short = {"en": "OK", "fi": "Hyväksy valinta"}
    assert apply(short) == (short, {})


def test_numbers_of_all_scripts_are_equal() -> None:
    same = {"en": "Wait 1,250 seconds", "de": "Warte 1.250 Sekunden", "ar": "انتظر ١٢٥٠ ثانية", "hi": "१२५० सेकंड रुकें"}
    assert apply(same, numbers=True) == (same, {})
    assert apply({"en": "Wait 10 seconds", "de": "Warte 5 Sekunden"}, numbers=True) == ({}, {"numbers": 1})


def test_urls() -> None:
    same = {"en": "See https://a.org/b.", "ja": "「https://a.org/b」を参照"}
    assert apply(same, urls=True) == (same, {})
    assert apply({"en": "See https://a.org/b", "de": "Siehe www.c.de"}, urls=True) == ({}, {"urls": 1})


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("Hello {name}, you owe ${ amount }", "Hello , you owe"),
        ("{count, plural, one {# item} other {{n} items}} left", "left"),
        ("%(user)s sent %1$s and %d files, 100% sure", "sent and files, 100% sure"),
    ],
)
def test_placeholders(text: str, stripped: str) -> None:
    assert apply({"en": text, "de": "gut"}, placeholders="strip")[0]["en"] == stripped
    assert reason("en", text, placeholders="drop") == "placeholders"
    assert reason("en", text) is None


def test_markup() -> None:
    text = 'Read <a href="x">the docs</a> or [ask us](https://a.org) if a < b'
    assert apply({"en": text, "de": "gut"}, markup="strip")[0]["en"] == "Read the docs or ask us if a < b"
    assert reason("en", text, markup="drop") == "markup"
    assert reason("en", "if a < b > c [now] (then)", markup="drop") is None


def test_held_out(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    chinese = "此许可证允许他人分发、改编和再创作您的资源,包括商业用途。"
    rows = [{"key": "1", "text": {"en": "A held-out  sentence", "zh": chinese}}]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "dev.txt").write_text(f"{long}\n", encoding="utf-8")
    settings: dict[str, Any] = {"held_out": {"files": ["dev.jsonl", "dev.txt"]}, "script": None}
    for text in ("a held-out sentence", f"so {long.upper()} and more", f"{chinese}谢谢"):
        assert reason("en", text, tmp_path, **settings) == "held_out"
    for text in ("one two three four five", long.replace("seven", "7"), "another sentence"):
        assert reason("en", text, tmp_path, **settings) is None
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        reason("en", "a", tmp_path, held_out={"files": ["none.txt"]})


def test_language_id() -> None:
    pytest.importorskip("py3langid")
    english = "The integration could not be set up because the device is not reachable."
    assert reason("de", english, language_id={}) == "language_id"
    norwegian = "Du har ikke tilgang til denne siden, prøv igjen senere."
    assert [reason(code, norwegian, language_id={}) for code in ("nb", "no", "da", "xx")] == [None] * 4


def test_language_id_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, settings in (("py3langid.langid", {}), ("fasttext", {"model": "lid.176.ftz"})):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=r"infoxlm-ds\[language-id\]"):
            reason("en", "a", language_id=settings)


def test_blocks_hold_the_letters_of_their_script() -> None:
    for script in BLOCKS:
        found = regex.compile(f"[{letters(script)}]").findall("".join(map(chr, range(0x10000))))
        kana = r"\p{Script=Hira}" if script == "Kana" else ""
        others = regex.compile(rf"[^\p{{Script={script}}}{kana}\p{{Common}}\p{{Inherited}}]").findall("".join(found))
        assert len(others) <= 0.15 * len(found), (script, others)  # Greek and Coptic share a block
        assert script not in ("Latn", "Cyrl", "Arab", "Hani", "Deva", "Thai") or not others


def test_scripts_of_codes() -> None:
    assert scripts("zh_TW") == scripts("zh-Hant-HK") == {"Hani", "Bopo"}
    assert scripts("sr") == {"Cyrl", "Latn"} and scripts("sr_Latn") == {"Latn"}
    assert scripts("ja") == {"Hani", "Kana"} and scripts("ko") == {"Hang", "Hani"}
    assert scripts("pt-BR") == scripts("nb") == {"Latn"}
    assert not scripts("xx")
    assert are_near("nb", "nn-NO") and are_near("zh_CN", "zh-Hant") and not are_near("en", "de")


def test_reports_do_not_depend_on_order() -> None:
    drops = [("letters", f"a line {i}", {"en": f"text {i % 40}"}) for i in range(200)]
    trees = []
    for seed in range(3):
        random.Random(seed).shuffle(drops)
        parts = [Report(1) for _ in range(7)]
        for number, drop in enumerate(drops):
            parts[number % 7].drop(*drop)
        merged = Report(1)
        for part in parts:
            merged.merge(Report.of_tree(1, json.loads(json.dumps(part.tree()))))
        trees.append(merged.tree())
    assert trees[0] == trees[1] == trees[2]
    assert trees[0]["counts"] == {"letters": 200}
    assert len({sample["texts"]["en"] for sample in trees[0]["samples"]["letters"]}) == SAMPLES


EVERYTHING = FilterSettings(numbers=True, urls=True, markup="strip", placeholders="strip")


ANY = st.text(st.characters(categories=None)) | st.text("{}%(a)s<>[] ,https://1١é的")


@given(st.dictionaries(st.sampled_from(sorted(REAL)), ANY.map(clean), max_size=5))
def test_no_text_raises_and_results_are_pure(texts: dict[str, str]) -> None:
    report, other = Report(1), Report(1)
    kept = Filters(EVERYTHING, Path()).row(Row("a", texts), report)
    assert kept == Filters(EVERYTHING, Path()).row(Row("a", dict(reversed(texts.items()))), other)
    assert report.tree() == other.tree()
