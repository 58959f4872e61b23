"""Readers: what they yield, the exact place of each fault, and the same for blocks of any size."""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.description import SourceDescription
from data_prep.rows import Document, Fault, Notice, Row
from data_prep.sources import READERS, lines
from data_prep.sources import text as text_module
from infoxlm_ds.config import UserError
from tests.data_prep.source_files import COMPRESS, PAIRS, PO_HEAD, SMALL, mono_jsonl, read, source, text, tsv

SIZES = (1, 2, 3, 5, 8, 13, 40, 10**9)


def places(base: Path, one: SourceDescription, size: int = 10**9) -> list[tuple[str, str]]:
    """Where the faults are, relative to `base`, and what they say."""
    found = [item for item in read(one, base, size) if isinstance(item, Fault)]
    return [(fault.place.removeprefix(f"{base}/"), fault.what) for fault in found]


def refusal(base: Path, one: SourceDescription) -> str:
    with pytest.raises(UserError) as caught:
        read(one, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("text", "mono_jsonl")])
def test_each_parallel_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    found = [item.texts for item in read(SMALL[name](tmp_path), tmp_path) if isinstance(item, Row)]
    expected = [{"en": en, "de": de} for en, de in PAIRS]
    if name == "mo":  # sorted by msgid
        found, expected = sorted(found, key=str), sorted(({"en": en, "de": de} for en, de in PAIRS), key=str)
    assert found == expected


def test_blank_lines_end_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    assert read(text(tmp_path), tmp_path) == [
        Document(f"{file} line 1", "en", ["one", "two"]),
        Document(f"{file} line 5", "en", ["three\u2028four"]),
        Document(f"{file} line 7", "en", ["five", "six"]),
    ]


def test_a_document_is_a_line_or_a_file_where_the_source_says_so(tmp_path: Path) -> None:
    one = text(tmp_path)
    found = read(one.model_copy(update={"documents": "line"}), tmp_path, 4)
    assert [x.sentences for x in found if isinstance(x, Document)] == [
        ["one"], ["two"], ["three\u2028four"], ["five"], ["six"]
    ]  # fmt: skip
    assert found[-1].place == f"{tmp_path}/a.txt line 8"
    (whole,) = read(one.model_copy(update={"documents": "file"}), tmp_path, 4)
    assert isinstance(whole, Document) and len(whole.sentences) == 5


def test_a_file_without_a_blank_line_is_one_document_with_a_notice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    document, notice, *others = read(source("text", "mono", path="*.txt", languages=("en",)), tmp_path, 1)
    assert isinstance(document, Document) and document.sentences == ["one", "two"]
    assert isinstance(notice, Notice) and notice.place == f"{tmp_path}/a.txt" and "no blank line" in notice.what
    assert all(isinstance(x, Document) for x in others) and len(others) == 2


def test_a_long_document_is_given_out_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "LONGEST", 5)
    (tmp_path / "a.txt").write_text("abc\ndef\nghi\n\njkl\n")
    found = read(source("text", "mono", path="a.txt", languages=("en",)), tmp_path)
    assert [x.sentences for x in found if isinstance(x, Document)] == [["abc", "def"], ["ghi"], ["jkl"]]


def test_monolingual_json_names_its_language_or_takes_that_of_the_source(tmp_path: Path) -> None:
    one = mono_jsonl(tmp_path)
    first, second = read(one, tmp_path)
    assert first == Document(f"{tmp_path}/m.jsonl line 1", "en", ["one", "two"])
    assert second == Document(f"{tmp_path}/m.jsonl line 2", "sw", ["moja", "mbili"])
    ((place, what),) = places(tmp_path, one.model_copy(update={"languages": ()}))
    assert place == "m.jsonl line 2" and '"language" is missing' in what


line_of_file = st.text(st.sampled_from(["a", "é", " ", "\t", "\r", "\u2028", "\x0b", "\ufeff"]), max_size=4)


@given(content=st.lists(line_of_file, max_size=12), end=st.booleans(), size=st.integers(1, 30))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_of_any_size_hold_what_the_files_hold(tmp_path: Path, content: list[str], end: bool, size: int) -> None:
    """Text, columns (with faults) and aligned lines."""
    (tmp_path / "a").write_bytes(("\n".join(content) + "\n" * end).encode())
    (tmp_path / "b").write_bytes(("\n".join(f"<{line}>" for line in content) + "\n").encode())
    (tmp_path / "a").touch()
    same = (tmp_path / "a").read_bytes().count(b"\n") + (not end and bool(content and content[-1])) == len(content)
    sources = [
        source("text", "mono", path="a", languages=("en",)),
        source("tsv", "para", path="a", languages=("x", "y")),
    ]
    sources += [source("text", "mono", path="a", languages=("en",), documents="line")]
    sources += [source("moses", "para", paths={"x": "a", "y": "b"})] * (same and bool(content))
    for one in sources:
        assert read(one, tmp_path, size) == read(one, tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_small_files_read_the_same_in_blocks_of_any_size(tmp_path: Path, name: str) -> None:
    one = SMALL[name](tmp_path)
    whole = read(one, tmp_path)
    assert whole and all(read(one, tmp_path, size) == whole for size in SIZES)


@pytest.mark.parametrize("name", ["jsonl", "text", "tsv", "moses"])
def test_blocks_are_about_as_long_as_asked_for(tmp_path: Path, name: str) -> None:
    one = SMALL[name](tmp_path)
    assert len(list(READERS[one.format].blocks(one, tmp_path, 1))) == {"text": 3}.get(name, len(PAIRS))
    parts = [part for block in READERS[one.format].blocks(one, tmp_path, 12) for part in block.parts]
    for file in {part.file for part in parts}:
        ends = [(part.start, part.end) for part in parts if part.file == file]
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == Path(file).stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["jsonl", "text", "tsv", "tmx"])
def test_compressed_files_are_read_like_plain_ones(tmp_path: Path, name: str, suffix: str) -> None:
    one = SMALL[name](tmp_path)
    assert one.path is not None
    plain = read(one, tmp_path)
    data = (tmp_path / one.path).read_bytes()
    halves = b"".join(map(COMPRESS[suffix], (data[:9], data[9:])))  # two streams, one behind the other
    (tmp_path / f"{one.path}{suffix}").write_bytes(halves)
    packed = read(one.model_copy(update={"path": f"{one.path}{suffix}"}), tmp_path, 5)
    assert [item._replace(place=item.place.replace(suffix, "")) for item in packed] == plain


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_is_cut_or_none_is_refused_with_the_place(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(1)
    whole = COMPRESS[suffix](b"".join(b"%d\t%040d\n" % (i, draw.getrandbits(10)) for i in range(60_000)))
    name = f"a.tsv{suffix}"
    one = source("tsv", "para", path=name, languages=("en", "de"))
    (tmp_path / name).write_bytes(whole[: len(whole) * 9 // 10])
    before, _, after = refusal(tmp_path, one).partition(" after line ")
    assert before == f"{tmp_path}/{name}" and int(after.split(":")[0]) > 10_000 and "cannot be read" in after
    (tmp_path / name).write_bytes(b"one\teins\n")
    assert f"{name} after line 0: cannot be read: " in refusal(tmp_path, one)


def test_a_path_may_be_a_pattern_a_folder_or_a_url(tmp_path: Path) -> None:
    (tmp_path / "d" / "below").mkdir(parents=True)
    for name in ("b.tsv", "a.tsv", ".hidden", "below/c.tsv"):
        (tmp_path / "d" / name).write_text(f"{name}\tx\n")
    memory = fsspec.filesystem("memory")
    memory.pipe({"/test_sources/a.tsv": b"\xef\xbb\xbfa.tsv\tx\nmore\ty\n", "/test_sources/b.tsv": b"b.tsv\tx\n"})

    def names(path: str, size: int = 10**9) -> list[str]:
        rows = read(source("tsv", "para", path=path, languages=("en", "de")), tmp_path, size)
        return [row.texts["en"] for row in rows if isinstance(row, Row)]

    assert names("d") == names("d/*.tsv") == names(str(tmp_path / "d")) == ["a.tsv", "b.tsv"]
    assert names("d/**/*.tsv") == ["a.tsv", "b.tsv", "below/c.tsv"]
    url = "memory://test_sources"
    assert names(url, 1) == names(f"{url}/*.tsv") == ["a.tsv", "more", "b.tsv"]
    assert names(f"{url}/b.tsv") == ["b.tsv"]
    first = read(source("tsv", "para", path=url, languages=("en", "de")), tmp_path)[0]
    assert first.place.startswith("memory://") and first.place.endswith("test_sources/a.tsv line 1")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.tsv", "none.tsv: no such file"),
        ("*.none", "*.none: no such file"),
        ("a\0b", "a\\x00b: no such file"),
        ("memory://none/at/all", "memory://none/at/all: no such file"),
        ("nothing://x", "nothing://x: not a URL that can be read"),
        ("/dev/null", "/dev/null: no such file"),
    ],
)
def test_a_path_without_a_file_is_refused(tmp_path: Path, path: str, message: str) -> None:
    assert message in refusal(tmp_path, source("tsv", "para", path=path, languages=("en", "de")))


def test_a_protocol_whose_package_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    message = refusal(tmp_path, source("tsv", "para", path="s3://bucket/a.tsv", languages=("en", "de")))
    assert message.startswith("s3://bucket/a.tsv: a package for this protocol is missing: ") and "s3fs" in message


@pytest.mark.parametrize("size", SIZES)
def test_bad_lines_are_faults_with_their_exact_place(tmp_path: Path, size: int) -> None:
    bad = {3: (b"ab\xffc\tx", "byte 3 of the line, 0xff, is not UTF-8"), 5: (b"a\0b\tx", "byte 2 of the line is NUL")}
    bad |= {
        7: (b"one", "1 columns, expected 2 (en, de)"),
        9: (b"\xed\xa0\x80\tx", "byte 1 of the line, 0xed, is not UTF-8"),
    }
    content = [bad[i][0] if i in bad else b"%d\tx" % i for i in range(1, 11)]
    (tmp_path / "a.tsv").write_bytes(b"\n".join(content))
    one = source("tsv", "para", path="a.tsv", languages=("en", "de"))
    assert places(tmp_path, one, size) == [(f"a.tsv line {i}", what) for i, (_, what) in bad.items()]
    rows = [item.place for item in read(one, tmp_path, size) if isinstance(item, Row)]
    assert rows == [f"{tmp_path}/a.tsv line {i}" for i in range(1, 11) if i not in bad]


@pytest.mark.parametrize("size", [10, 10**9])
@pytest.mark.parametrize("length", [50, 100, 101, 1000])
def test_a_line_that_is_too_long_is_left_out_and_its_neighbours_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, size: int
) -> None:
    monkeypatch.setattr(lines, "LONGEST", 100)
    monkeypatch.setattr(lines, "CHUNK", 30)
    (tmp_path / "a.txt").write_text("one\n" + "x" * length + "\ntwo\n" + "y" * length)
    one = source("text", "mono", path="a.txt", languages=("en",), documents="line")
    long = [("a.txt line 2", "longer than 100 bytes"), ("a.txt line 4", "longer than 100 bytes")]
    assert places(tmp_path, one, size) == (long if length > 100 else [])
    kept = [item.sentences[0] for item in read(one, tmp_path, size) if isinstance(item, Document)]
    assert [sentence for sentence in kept if len(sentence) < 10] == ["one", "two"]


BAD_JSON = {
    "[1]": "not an object",
    "": "not valid JSON: Expecting value at character 1",
    '{"text": {"en": "a"': "not valid JSON: Expecting ',' delimiter at character 20",
    "[" * 100_000: "not valid JSON: nested too deeply",
    "9" * 5000: "Exceeds the limit",
    '{"key": "x"}': '"text" is missing',
    '{"text": ["en"]}': '"text" is missing or is not of the form {language: ...}',
    '{"text": {"en": 3}}': "the sentence of 'en' is not a string",
    '{"text": {"en": "x \\ud83d"}}': "the sentence of 'en' has half a surrogate pair",
    '{"text": {"en": "x\\u0000"}}': "the sentence of 'en' has a NUL character",
    '{"text": {"\\ud83d": "x"}}': 'a language code of "text" has half a surrogate pair',
    '{"text": {"en": "x"}, "negatives": ["x"]}': '"negatives" is missing or is not of the form',
    '{"text": {"en": "x"}, "negatives": {"en": "x"}}': "the negatives of 'en' are not a list",
    '{"text": {"en": "x"}, "negatives": {"en": [1]}}': "a negative of 'en' is not a string",
}


def test_bad_json_is_a_fault_with_its_line(tmp_path: Path) -> None:
    good = '{"text": {"en": "a", "de": "b"}}'
    (tmp_path / "a.jsonl").write_text("".join(f"{good}\n{bad}\n" for bad in BAD_JSON))
    found = places(tmp_path, source("jsonl", "nway", path="a.jsonl"))
    assert [place for place, _ in found] == [f"a.jsonl line {2 * i}" for i in range(1, len(BAD_JSON) + 1)]
    assert [what for (_, what), part in zip(found, BAD_JSON.values(), strict=True) if part not in what] == []


def test_bad_monolingual_json_is_a_fault_with_its_line(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [{"text": 3}, {}, {"text": ["a", 1]}, {"text": "a", "language": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    found = places(tmp_path, source("jsonl", "mono", path="a.jsonl", languages=("en",)))
    assert [place for place, _ in found] == [f"a.jsonl line {i}" for i in (1, 2, 3, 4)]


def test_negatives_come_with_their_row(tmp_path: Path) -> None:
    row = SMALL["jsonl"](tmp_path)
    first = read(row, tmp_path)[0]
    assert isinstance(first, Row) and first.negatives == {"de": ["falsch"]}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("english", "german"), [(3, 2), (2, 3), (0, 1), (2000, 3000)])
def test_aligned_files_of_different_length_are_refused_with_both_counts(
    tmp_path: Path, suffix: str, english: int, german: int
) -> None:
    for code, count in (("en", english), ("de", german)):
        data = "\n".join("abc"[i % 3] for i in range(count)).encode()
        (tmp_path / f"a.{code}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    one = source("moses", "para", paths={code: f"a.{code}{suffix}" for code in ("en", "de")})
    message = refusal(tmp_path, one)
    assert f"a.en{suffix}: {english:,}" in message and f"a.de{suffix}: {german:,}" in message


def test_a_bad_line_of_an_aligned_file_is_left_out_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"one\ntwo\rmore\nthree\n")
    (tmp_path / "a.de").write_bytes(b"eins\nzwei\r\ndr\xffi\n")
    one = source("moses", "para", paths={"en": "a.en", "de": "a.de"})
    for size in SIZES:
        assert places(tmp_path, one, size) == [("a.de line 3", "byte 3 of the line, 0xff, is not UTF-8")]
        rows = [item.texts for item in read(one, tmp_path, size) if isinstance(item, Row)]
        assert rows == [{"en": "one", "de": "eins"}, {"en": "two\rmore", "de": "zwei"}]


def test_aligned_patterns_need_as_many_files_of_each_language(tmp_path: Path) -> None:
    for name in ("1.en", "2.en", "1.de", "2.de"):
        (tmp_path / name).write_text(f"{name}\n")
    one = source("moses", "para", paths={"en": "*.en", "de": "*.de"})
    rows = [item.texts for item in read(one, tmp_path) if isinstance(item, Row)]
    assert rows == [{"en": "1.en", "de": "1.de"}, {"en": "2.en", "de": "2.de"}]
    (tmp_path / "3.en").write_text("x\n")
    assert "(*.en: 3, *.de: 2)" in refusal(tmp_path, one)


def test_zips_of_opus_are_never_unpacked(tmp_path: Path) -> None:
    """A pair whose names lead elsewhere, beside one of zeros."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for code in ("de", "en"):
            archive.writestr(f"../../evil.de-en.{code}", f"{code}\n")
            with archive.open(f"bomb.de-en.{code}", "w") as member:
                for _ in range(20):
                    member.write(bytes(10**6))
    found = read(source("opus", "para", path="a.zip"), tmp_path)
    row, fault = found
    assert isinstance(row, Row) and row.texts == {"de": "de", "en": "en"}
    assert isinstance(fault, Fault) and fault.what == "longer than 10,000,000 bytes"
    assert fault.place == f"{tmp_path}/a.zip/bomb.de-en.de line 1"
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_zip_that_is_none_or_has_no_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 no zip")
    assert "a.zip: cannot be read: " in refusal(tmp_path, source("opus", "para", path="a.zip"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.de-en.en", "one\n")
    assert "is it a Moses zip of OPUS?" in refusal(tmp_path, source("opus", "para", path="a.zip"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.de-en.en", "one\ntwo\n")
        archive.writestr("a.de-en.de", "eins\n")
    message = refusal(tmp_path, source("opus", "para", path="a.zip"))
    assert "a.zip/a.de-en.en: 2" in message and "a.zip/a.de-en.de: 1" in message


def tmx_with(folder: Path, body: str, head: str = "") -> SourceDescription:
    (folder / "a.tmx").write_text(f"{head}<tmx><body>{body}</body></tmx>", encoding="utf-8")
    return source("tmx", "nway", path="a.tmx")


def test_markup_and_comments_in_a_translation_memory_are_no_text(tmp_path: Path) -> None:
    segment = 'A <bpt i="1">&lt;b></bpt>bold<ept i="1">&lt;/b></ept> <hi>word<ph>x</ph>s</hi><!-- c -->!'
    body = f'<tu><tuv xml:lang="en"><seg>{segment}</seg></tuv><tuv lang="de"><seg>B</seg></tuv></tu>'
    (row,) = read(tmx_with(tmp_path, body), tmp_path)
    assert isinstance(row, Row) and row.texts == {"en": "A bold words!", "de": "B"}


def test_faults_of_a_translation_memory_name_the_unit(tmp_path: Path) -> None:
    good = '<tu><tuv xml:lang="en"><seg>x</seg></tuv></tu>'
    bad = '<tu><tuv><seg>x</seg></tuv></tu><tu><tuv xml:lang="en"/></tu>'
    assert places(tmp_path, tmx_with(tmp_path, good + bad + good)) == [
        ("a.tmx unit 2", "a <tuv> has no xml:lang"),
        ("a.tmx unit 3", "the <tuv> of 'en' has no <seg>"),
    ]
    (tmp_path / "a.tmx").write_text(f"<!-- c -->{good}")
    assert len(read(source("tmx", "nway", path="a.tmx"), tmp_path)) == 1
    assert "a.tmx after unit 1: cannot be read: " in refusal(tmp_path, tmx_with(tmp_path, good + "<tu></seg>"))


def test_entities_of_a_translation_memory_are_harmless(tmp_path: Path) -> None:
    """Neither a file nor a gigabyte comes out of them."""
    (tmp_path / "secret").write_text("secret")
    grow = "".join(f'<!ENTITY b{i} "{f"&b{i - 1};" * 10}">' for i in range(1, 30))
    head = f'<!DOCTYPE tmx [<!ENTITY f SYSTEM "{tmp_path}/secret"><!ENTITY b0 "x">{grow}]>'
    for text_of, language in (("&f;", "en"), ("&b29;", "en"), ("x", "&b29;")):
        body = f'<tu><tuv xml:lang="{language}"><seg>a{text_of}b</seg></tuv></tu>'
        started = time.monotonic()
        try:
            (row,) = read(tmx_with(tmp_path, body, head), tmp_path)
            assert isinstance(row, Row) and row.texts == {"en": "ab"}
        except UserError as error:
            assert "after unit 0: cannot be read" in str(error)
        assert time.monotonic() - started < 5


def test_translations_of_a_message_are_one_row_over_all_languages(tmp_path: Path) -> None:
    german = """
#, fuzzy
msgid "fuzzy"
msgstr "unscharf"

msgctxt "month"
msgid "may"
msgstr "Mai"

msgid "may"
msgstr "darf"

msgid "file"
msgid_plural "files"
msgstr[0] "Datei"
msgstr[1] "Dateien"

msgid "none"
msgstr ""

#~ msgid "old"
#~ msgstr "alt"
"""
    for domain in ("app", "web"):
        for code, body in (("de", german), ("fr", 'msgctxt "month"\nmsgid "may"\nmsgstr "mai"\n')):
            (tmp_path / "l" / code).mkdir(parents=True, exist_ok=True)
            (tmp_path / "l" / code / f"{domain}.po").write_text(PO_HEAD + body, encoding="utf-8")
    one = source("gettext", "nway", path="./l/{language}/*.po", languages=("en",))
    assert len(list(READERS["gettext"].blocks(one, tmp_path, 1))) == 2
    rows = read(one, tmp_path)
    expected = [{"en": "may", "de": "Mai", "fr": "mai"}, {"en": "may", "de": "darf"}, {"en": "file", "de": "Datei"}]
    assert [row.texts for row in rows if isinstance(row, Row)] == expected * 2
    assert rows[0].place == f"{tmp_path}/l/de/app.po line 10"


def test_the_language_may_stand_in_a_path_twice(tmp_path: Path) -> None:
    for code, other in (("de", "de"), ("fr", "fr"), ("fr", "de")):
        (tmp_path / code).mkdir(exist_ok=True)
        (tmp_path / code / f"app.{other}.po").write_text(f'{PO_HEAD}msgid "x"\nmsgstr "{code} {other}"\n')
    one = source("gettext", "nway", path="{language}/*.{language}.po", languages=("en",))
    (row,) = read(one, tmp_path)
    assert isinstance(row, Row) and row.texts == {"en": "x", "de": "de de", "fr": "fr fr"}
    assert "no such file" in refusal(tmp_path, one.model_copy(update={"path": "{language}/app.po"}))


def test_a_catalog_that_is_none_is_refused(tmp_path: Path) -> None:
    for name, data in {"a.po": b'msgid "x\nfoo', "b.po": b"\xff\xfe", "c.mo": b"\xde\x12\x04\x95\xff"}.items():
        (tmp_path / name).write_bytes(data)
        one = source("gettext", "para", paths={"de": name}, languages=("en",))
        assert f"{name}: cannot be read: " in refusal(tmp_path, one)


def test_a_catalog_that_is_the_path_of_a_file_does_not_open_it(tmp_path: Path) -> None:
    (tmp_path / "other.po").write_text(PO_HEAD + 'msgid "secret"\nmsgstr "geheim"\n')
    (tmp_path / "de.po").write_text(str(tmp_path / "other.po"))
    assert "de.po: cannot be read" in refusal(
        tmp_path, source("gettext", "para", paths={"de": "de.po"}, languages=("en",))
    )


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"english": [en for en, _ in PAIRS] + [None], "german": [de for _, de in PAIRS] + ["5"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    one = source("parquet", "para", path="*.parquet", columns={"en": "english", "de": "german"})
    whole = read(one, tmp_path)
    assert len(list(READERS["parquet"].blocks(one, tmp_path, 1))) == 3
    assert all(read(one, tmp_path, size) == whole for size in SIZES)
    assert [row.texts for row in whole if isinstance(row, Row)] == [{"en": en, "de": de} for en, de in PAIRS] + [
        {"de": "5"}
    ]
    assert whole[-1].place == f"{tmp_path}/a.parquet row 5"
    wrong = source("parquet", "para", path="a.parquet", languages=("en", "de"))
    assert "a.parquet: has no column 'en'" in refusal(tmp_path, wrong)


def test_monolingual_parquet_holds_documents_and_faults(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a\nb", "", None, "c"], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    one = source("parquet", "mono", path="a.parquet", languages=("sw",))
    file = tmp_path / "a.parquet"
    assert read(one, tmp_path) == [
        Document(f"{file} row 1", "sw", ["a", "b"]),
        Document(f"{file} row 4", "sw", ["c"]),
    ]
    numbers = one.model_copy(update={"columns": {"sw": "n"}, "languages": ()})
    assert places(tmp_path, numbers)[3] == ("a.parquet row 4", "a sentence is not a string")
    file.write_bytes(file.read_bytes()[:-9])
    assert "a.parquet: cannot be read: " in refusal(tmp_path, one)


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    one = source("parquet", "mono", path="a.parquet", languages=("sw",))
    assert "pip install 'infoxlm-ds[parquet]'" in refusal(tmp_path, one)


def test_a_file_that_may_not_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tsv(tmp_path)

    def refuse(self: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert "a.tsv: cannot be opened: Permission denied" in refusal(tmp_path, one)
