"""Each mistake in a corpus description or in its files gives one line that names it."""

import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.description import load_description
from data_prep.keys import ABOUT_CORPORA, ABOUT_RECIPES, with_keys
from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import lines, read_nway

SOURCE: dict[str, Any] = {"name": "nway.a", "kind": "nway", "format": "jsonl", "path": "a.jsonl"}
MONO: dict[str, Any] = {"name": "mono.a", "kind": "mono", "format": "text", "path": "a.txt", "languages": ["en"]}
GOOD: dict[str, Any] = {"name": "tiny", "tokenizer": {"vocab_size": 800}, "sources": [SOURCE]}


def load(folder: Path, tree: dict[str, Any]) -> None:
    (folder / "c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    load_description(folder / "c.yaml")


def test_the_embedded_description_is_right() -> None:
    from tests.corpus import EMBEDDED

    description = load_description(EMBEDDED / "corpus.yaml")
    assert all(source.path and (EMBEDDED / source.path).is_file() for source in description.sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_token": 9}, "max_token is not a known key"),
        ({"max_tokens": 70_000}, "max_tokens: "),
        ({"tokenizer": {}}, "set either path"),
        ({"tokenizer": {"vocab_size": 9, "path": "x"}}, "set either path"),
        ({"sources": []}, "sources: the list is empty: name at least one source of texts"),
        ({"sources": [SOURCE, SOURCE]}, "two sources have the same name"),
        ({"sources": [SOURCE | {"colour": 1}]}, "sources.0.colour is not a known key"),
        ({"sources": [SOURCE | {"path": None}]}, "format jsonl needs path"),
        ({"sources": [MONO | {"languages": []}]}, "format text needs languages"),
        ({"sources": [MONO | {"languages": ["en", "de"]}]}, "monolingual text has one language"),
        ({"sources": [MONO | {"documents": "page"}]}, "sources.0.documents: "),
        ({"sources": [SOURCE | {"documents": "line"}]}, "format jsonl does not use documents"),
        ({"sources": [SOURCE | {"format": "text"}]}, "format text is for kind mono"),
        ({"sources": [SOURCE | {"format": "parquet"}]}, "format parquet needs one of languages and columns"),
        ({"sources": [SOURCE | {"format": "gettext", "languages": ["en"]}]}, "needs {language} in it"),
        ({"sources": [SOURCE | {"format": "tsv", "languages": ["en", "en"]}]}, "languages names a language twice"),
        ({"sources": [{"name": "nway.a"}]}, "sources.0.format is missing: set it"),
        ({"sources": [SOURCE | {"paths": {"en": "b"}}]}, "format jsonl does not use paths"),
        ({"sources": [SOURCE | {"languages": ["en"]}]}, "format jsonl does not use languages with kind nway"),
        ({"sources": [MONO | {"mono": True}]}, "kind mono does not use mono"),
        ({"sources": [SOURCE | {"name": "../etc"}]}, "name: "),
        ({"sources": [SOURCE | {"name": "tokenizer"}]}, "the name of a nway source must start with nway."),
        (
            {"sources": [SOURCE | {"kind": "mono", "name": "mono.a", "format": "tmx"}]},
            "format tmx is for kind para or nway",
        ),
        (
            {
                "sources": [
                    {"name": "para.a", "kind": "para", "format": "tsv", "path": "a", "languages": ["a", "b", "c"]}
                ]
            },
            "kind para has two languages",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_description_names_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    load(tmp_path, GOOD)
    with pytest.raises(UserError) as raised:
        load(tmp_path, GOOD | change)
    assert message in str(raised.value) and "\n" not in str(raised.value) and "c.yaml" in str(raised.value)


@pytest.mark.parametrize("content", ["- a", "a: [", ""])
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_description(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="no such corpus description"):
        load_description(tmp_path / "none.yaml")


@pytest.mark.parametrize("line", ["[]", "{", '{"text": {"en": 3}}', '{"key": "x"}'])
def test_a_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": {"en": "x"}}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl line 2"):
        list(read_nway(tmp_path / "a.jsonl"))


GOOD_LINES = b"".join(b"line %d\n" % i for i in range(1, 50))


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.txt", GOOD_LINES + b"\xff\n", 50),
        ("a.txt.xz", lzma.compress(GOOD_LINES + b"bad \xc3(\n"), 50),
        ("a.txt.xz", b"not xz", 1),
        ("a.txt.xz", lzma.compress(GOOD_LINES)[:-9], 50),
    ],
)
def test_a_file_that_cannot_be_decoded_is_named_with_the_line(
    tmp_path: Path, name: str, data: bytes, line: int
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} line {line}: cannot be read"):
        list(lines(tmp_path / name))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such file"):
        list(lines(tmp_path / "none"))


@pytest.mark.parametrize("document", [ABOUT_CORPORA, ABOUT_RECIPES], ids=lambda path: path.name)
def test_the_tables_of_keys_are_those_of_the_code(document: Path) -> None:
    assert document.read_text(encoding="utf-8") == with_keys(document), "run `python -m data_prep.keys`"


def test_the_example_of_the_documentation_is_a_description(tmp_path: Path) -> None:
    example = ABOUT_CORPORA.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "corpus.yaml").write_text(example, encoding="utf-8")
    assert [source.name for source in load_description(tmp_path / "corpus.yaml").sources] == ["para.news", "mono.sw"]
