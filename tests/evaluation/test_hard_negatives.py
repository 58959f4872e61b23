"""Hard negatives: those of an oracle that compares every text with every row; real rows go on into a corpus."""

from __future__ import annotations

import itertools
import json
import lzma
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep.build import build
from infoxlm_ds import cli
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.packs import text_id
from infoxlm_ds.evaluation import hard_negatives, workspace
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.hard_negatives import mine_hard_negatives
from infoxlm_ds.shipped import EMBEDDED

Rows = list[dict[str, str]]


def _write(path: Path, rows: Rows) -> Path:
    lines = [json.dumps({"key": str(number), "text": row}) + "\n" for number, row in enumerate(rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class MadeUp:
    """A vector for each text, from its hash, or the one that a test gives it."""

    width, device = 8, None

    def __init__(self, model: Path, device: str | None = None, half: bool = False) -> None:
        pass

    @classmethod
    def vector(cls, text: str) -> np.ndarray:
        drawn = np.abs(np.random.default_rng(zlib.crc32(text.encode())).normal(size=8))
        return (drawn / np.linalg.norm(drawn)).astype(np.float16).astype(np.float64)  # as the work folder keeps it

    def embed(self, sentences: list[str], *, description: str = "") -> np.ndarray:
        return np.stack([self.vector(text) for text in sentences]).astype(np.float32)[None]


def _oracle(rows: Rows, row: dict[str, str], language: str, count: int, margin: float) -> set[str]:
    """Of all different texts of the language, one by one."""
    query = np.sum([MadeUp.vector(text) for code, text in row.items() if code != language], axis=0)
    query /= np.linalg.norm(query)
    limit = margin * query @ MadeUp.vector(row[language])
    right = {other.get(language) for other in rows if set(other.items()) & set(row.items())}
    texts = {other[language] for other in rows if language in other} - right
    near = sorted((-float(query @ MadeUp.vector(text)), text) for text in texts)
    return {text for _, text in [pair for pair in near if -pair[0] < limit][:count]}


@pytest.mark.parametrize(("seed", "languages"), [(1, "ab"), (2, "abcd")])
def test_negatives_are_those_of_the_oracle(
    seed: int, languages: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows lack languages, and share texts with other rows."""
    monkeypatch.setattr(hard_negatives, "SentenceEmbedder", MadeUp)
    monkeypatch.setattr(hard_negatives, "CHUNK", 50)
    draw = np.random.default_rng(seed)
    rows: Rows = [
        {code: f"{code}{draw.integers(150)}" for code in languages if draw.random() < 0.8} for _ in range(180)
    ]
    rows += [{"a": f"a{number}", "z": f"z{number}"} for number in range(5)]  # the first blocks lack this language
    mine_hard_negatives(_write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", model_folder, 3)
    written = _read(tmp_path / "out.jsonl")
    assert [tree["text"] for tree in written] == rows
    found = 0
    for row, tree in zip(rows, written, strict=True):
        for code in row:
            expected = _oracle(rows, row, code, 3, 0.95) if len(row) > 1 else set()
            assert set(tree["negatives"].get(code, [])) == expected
            found += len(expected)
    assert found > 400 and any(len(row) == 1 for row in rows)


def test_near_texts_and_texts_of_equal_rows_stay_out(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: all English texts have the same vector. The cosine of the first pair is .8, so only cosines below .76
    count."""
    cosines = {"Lampe": 0.8, "Leuchte": 0.78, "Tür": 0.75, "Licht": 0.74, "See": 0.6, "Katze": -0.5}
    english = ["lamp", "light", "door", "LAMP", "sea", "cat"]
    made = {text: np.array([cosine, (1 - cosine**2) ** 0.5]) for text, cosine in cosines.items()}
    made |= dict.fromkeys(english, np.array([1.0, 0.0]))
    monkeypatch.setattr(MadeUp, "width", 2)
    monkeypatch.setattr(MadeUp, "vector", made.__getitem__)
    monkeypatch.setattr(hard_negatives, "SentenceEmbedder", MadeUp)
    rows = [{"en": en, "de": de} for en, de in zip(english, cosines, strict=True)]
    mine_hard_negatives(_write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", model_folder, 2)
    # "Leuchte" is too near, and "Licht" is right: its row has the text of this row, in capitals.
    assert _read(tmp_path / "out.jsonl")[0]["negatives"]["de"] == ["Tür", "See"]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """150 rows of the embedded corpus, with two to four languages."""
    with lzma.open(EMBEDDED / "home_assistant.train.jsonl.xz", "rt", encoding="utf-8") as lines:
        trees = [json.loads(line) for line in itertools.islice(lines, 150)]
    codes = ("en", "de", "hu", "ko")
    rows = [{code: tree["text"][code] for code in codes if code in tree["text"]} for tree in trees]
    return _write(tmp_path / "rows.jsonl", [row for row in rows if len(row) > 1])


def _mine(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `infoxlm mine ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["infoxlm", "mine", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_mined_rows_become_a_corpus_with_hard_negatives(
    real: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--hard-negatives", "2", "--margin", "0.99", "--model", model_folder)
    assert _mine(monkeypatch, *options, real, tmp_path / "mined.jsonl") == 0
    mined = [(tree["text"], tree["negatives"]) for tree in _read(tmp_path / "mined.jsonl")]
    assert all(text not in texts.values() for texts, wrong in mined for of in wrong.values() for text in of)
    description = {
        "name": "mined",
        "max_tokens": 500,
        "tokenizer": {"vocab_size": 600},
        "sources": [{"name": "nway.rows", "kind": "nway", "format": "jsonl", "path": "mined.jsonl"}],
    }
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(description))
    build(tmp_path / "corpus.yaml", tmp_path / "corpus")
    stored = Corpus(tmp_path / "corpus").pack(0, 0).negatives
    expected = {text_id(text) for _, wrong in mined for of in wrong.values() for text in of}
    assert len(stored) > 500 and set(stored.text_ids.tolist()) == expected


def test_a_stopped_run_goes_on_to_the_same_bytes(
    real: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "CHUNK", 64)
    mine_hard_negatives(real, tmp_path / "whole.jsonl", model_folder, 2)
    embed, calls = SentenceEmbedder.embed, list[str]()

    def counted(self: SentenceEmbedder, sentences: list[str], **rest: Any) -> np.ndarray:
        calls.append(sentences[0])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return embed(self, sentences, **rest)

    monkeypatch.setattr(SentenceEmbedder, "embed", counted)
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(real, tmp_path / "out.jsonl", model_folder, 2)
    assert not (tmp_path / "out.jsonl").exists()
    mine_hard_negatives(real, tmp_path / "out.jsonl", model_folder, 2)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert calls[4] == calls[5] and len(calls) == len(set(calls)) + 1
    assert not (tmp_path / "out.jsonl.work").exists()


def test_each_mistake_is_one_line(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, out = _write(tmp_path / "good.jsonl", [{"en": "a", "de": "b"}]), tmp_path / "bad.jsonl", tmp_path / "out"
    alone = _write(tmp_path / "alone.jsonl", [{"en": "a"}])
    bad.write_text('{"text": {"en": "\\ud800"}}\n')
    hard = ("--model", model_folder, "--hard-negatives", "2")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((*hard, good, good, out), "give two files: ROWS.jsonl OUT.jsonl"),
        ((*hard, good, out, "--threshold", "1"), "only --margin, --model and --device"),
        ((*hard, good, out, "--margin", "2"), "--help`"),
        ((*hard, tmp_path / "none", out), "none: no such file of rows"),
        ((*hard, bad, out), 'bad.jsonl line 1: expected {"text": {language: sentence}}'),
        ((*hard, alone, out), "alone.jsonl has no row with texts in two languages"),
        (("--model", model_folder, good, out), "give three files: A.txt B.txt OUT.tsv"),
        (("--model", model_folder, good, good, out, "--margin", "0.9"), "--margin is for --hard-negatives only"),
    ]
    for arguments, message in cases:
        assert _mine(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("infoxlm: ")
    assert not list(tmp_path.glob("out*"))
