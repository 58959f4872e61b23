"""Mining: the margin score and the choice of pairs equal a float64 oracle; a killed run goes on to the same bytes."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds import cli
from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.evaluation import approximate, mining, workspace
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.mining import How, mined_pairs
from infoxlm_ds.evaluation.neighbours import SCORES, Score, nearest
from infoxlm_ds.evaluation.workspace import work_folder
from infoxlm_ds.shipped import EMBEDDED


def _unit(n: int, seed: int, width: int = 8) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _margin(score: Score, cosine: np.ndarray, k: int) -> np.ndarray:
    """Of all pairs [n, m], in float64."""
    rows = np.sort(cosine, axis=1)[:, ::-1][:, :k].mean(axis=1)[:, None] / 2
    columns = np.sort(cosine, axis=0)[::-1][:k].mean(axis=0)[None, :] / 2
    forms = {"cosine": cosine, "ratio": cosine / (rows + columns), "distance": cosine - rows - columns}
    return forms[score] if score in forms else 2 * cosine - 2 * rows - 2 * columns


def _pairs(cosine: np.ndarray, how: How) -> list[tuple[float, int, int]]:
    """Each text's best of its k nearest; then, again and again, the best candidate of texts that are still free."""
    margin = _margin(how.score, cosine, how.k)
    near_a, near_b = np.argsort(-cosine, axis=1)[:, : how.k], np.argsort(-cosine, axis=0)[: how.k].T
    of_a = {(a, max(near_a[a], key=lambda b: margin[a, b])) for a in range(len(cosine))}
    of_b = {(max(near_b[b], key=lambda a: margin[a, b]), b) for b in range(cosine.shape[1])}
    free = of_a & of_b if how.retrieval == "intersect" else of_a | of_b
    kept = []
    while free:
        a, b = max(free, key=lambda pair: margin[pair])
        kept.append((float(margin[a, b]), int(a), int(b)))
        free = {pair for pair in free if pair[0] != a and pair[1] != b}
    return kept


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 6),
    st.sampled_from(SCORES),
    st.sampled_from(["max", "intersect"]),
    st.integers(0, 99),
)
def test_pairs_are_those_of_the_oracle(n: int, m: int, k: int, score: Score, retrieval: str, seed: int) -> None:
    a, b = np.abs(_unit(n, seed)), np.abs(_unit(m, seed + 100))  # positive cosines, as of an encoder
    how = How(score, k, retrieval=retrieval)  # type: ignore[arg-type]
    expected = _pairs(a.astype(np.float64) @ b.astype(np.float64).T, how)
    mined = mined_pairs(a, b, how)
    # As a set: with one neighbour, many scores are equal.
    assert set(zip(mined.a.tolist(), mined.b.tolist(), strict=True)) == {(a, b) for _, a, b in expected}
    np.testing.assert_allclose(mined.score, [score for score, _, _ in expected], atol=1e-5)


def test_a_hub_wins_by_cosine_and_not_by_margin() -> None:
    """The second text of B lies near to all of A, nearer to A's first text than its translation does."""
    b = np.array([[1, 0, 0.0], [0.8, 0.6, 0], [0, 1, 0]])
    a = np.array([[0.88, 0.35, 0.0], [0.55, 0.75, 0.1], [0.3, 0.9, 0.1], [0.6, 0.6, 0.3]])
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    assert (a @ b.T)[0].argmax() == 1
    mined = mined_pairs(a.astype(np.float32), b.astype(np.float32), How("ratio", 3))
    assert (0, 0) in set(zip(mined.a.tolist(), mined.b.tolist(), strict=True))


class MadeUp:
    """Vectors of translations lie near each other, those of other texts at random."""

    width, device = 32, None
    row_of: ClassVar[dict[str, int]] = {}

    def __init__(self, model: Path, device: str | None = None, half: bool = False) -> None:
        pass

    def embed(self, sentences: list[str], *, description: str = "") -> np.ndarray:
        noise = np.concatenate([_unit(1, zlib.crc32(text.encode()), 32) for text in sentences])
        rows = np.concatenate([_unit(1, self.row_of.get(text, zlib.crc32(text.encode())), 32) for text in sentences])
        vectors = rows + 0.5 * noise
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)[None]


@pytest.fixture
def texts(tmp_path: Path) -> list[tuple[str, str]]:
    """A.txt and B.txt: the first 250 rows in English and German, and 200 other rows on each side. The pairs."""
    rows = [row for row in read_nway(EMBEDDED / "wagtail.dev.jsonl.xz") if {"en", "de"} <= set(row)]
    unique = list({row["en"].strip(): row for row in {row["de"].strip(): row for row in rows}.values()}.values())
    english, german = ([row[code].strip() for row in unique[:650]] for code in ("en", "de"))
    a, b = english[:450], german[450:] + german[:250][::-1]
    (tmp_path / "A.txt").write_text("\n".join([*a, "", *a[:9]]), encoding="utf-8")  # a blank line, and doubles
    (tmp_path / "B.txt").write_text("\n".join(b), encoding="utf-8")
    return list(zip(english[:250], german[:250], strict=True))


def _mine(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `infoxlm mine ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["infoxlm", "mine", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def _table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("options", [(), ("--search", "ivf"), ("--retrieval", "intersect"), ("--score", "csls")])
def test_planted_pairs_are_found_among_distractors(
    texts: list[tuple[str, str]],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    if "ivf" in options:
        pytest.importorskip("faiss", reason="faiss is not installed")
    monkeypatch.setattr(mining, "SentenceEmbedder", MadeUp)
    monkeypatch.setattr(MadeUp, "row_of", {text: row for row, pair in enumerate(texts) for text in pair})
    out = tmp_path / "out.tsv"
    assert _mine(monkeypatch, tmp_path / "A.txt", tmp_path / "B.txt", out, "--model", model_folder, *options) == 0
    error = capsys.readouterr().err
    table = _table(out)
    scores = [float(score) for score, _, _ in table]
    assert scores == sorted(scores, reverse=True)
    best = {(a, b) for _, a, b in table[:250]}
    assert len(best & set(texts)) >= 245
    assert len({a for _, a, _ in table}) == len({b for _, _, b in table}) == len(table)
    assert "450 and 450 different texts" in error and ("recall of the" in error) == ("ivf" in options)
    assert not (tmp_path / "out.tsv.work").exists()


def test_a_threshold_cuts_the_table(
    texts: list[tuple[str, str]], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (tmp_path / "A.txt", tmp_path / "B.txt", tmp_path / "out.tsv", "--model", model_folder)
    assert _mine(monkeypatch, *files) == 0
    whole = _table(tmp_path / "out.tsv")
    threshold = (float(whole[9][0]) + float(whole[10][0])) / 2
    assert _mine(monkeypatch, *files, "--threshold", str(threshold)) == 0
    assert _table(tmp_path / "out.tsv") == whole[:10]


def test_a_stopped_run_goes_on_to_the_same_bytes(
    texts: list[tuple[str, str]], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "CHUNK", 100)
    embed, calls = SentenceEmbedder.embed, list[str]()

    def counted(self: SentenceEmbedder, sentences: list[str], **rest: Any) -> np.ndarray:
        calls.append(sentences[0])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return embed(self, sentences, **rest)

    files = (tmp_path / "A.txt", tmp_path / "B.txt")
    mining.mine(*files, tmp_path / "whole.tsv", model_folder, How())
    monkeypatch.setattr(SentenceEmbedder, "embed", counted)
    with pytest.raises(KeyboardInterrupt):
        mining.mine(*files, tmp_path / "out.tsv", model_folder, How())
    assert not (tmp_path / "out.tsv").exists()
    mining.mine(*files, tmp_path / "out.tsv", model_folder, How())
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert len(calls) == 7 + 4 and calls[6] == calls[7]  # 5 chunks of each side, and one was begun again


def test_a_work_folder_of_other_texts_is_refused(
    texts: list[tuple[str, str]], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        work_folder(tmp_path / "x.tsv", model_folder, [tmp_path / "A.txt"]) as folder,
    ):
        (folder / "A.npy.done").touch()
        raise ZeroDivisionError
    with pytest.raises(UserError, match="remove it"), work_folder(tmp_path / "x.tsv", model_folder, []):
        pass
    (tmp_path / "y.tsv.work").mkdir()
    (tmp_path / "y.tsv.work" / "precious").touch()
    with pytest.raises(UserError, match="remove it"), work_folder(tmp_path / "y.tsv", model_folder, []):
        pass
    assert (tmp_path / "y.tsv.work" / "precious").exists()


def test_an_output_that_is_an_input_or_cannot_be_written_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "A.txt").write_text("one\n")
    for out, why in ((tmp_path / "A.txt", "is read and would be replaced"), (tmp_path / "A.txt" / "x", "cannot be")):
        with pytest.raises(UserError, match=why):
            mining.mine(tmp_path / "A.txt", tmp_path / "A.txt", out, model_folder, How())
    assert (tmp_path / "A.txt").read_text() == "one\n"


def test_texts_have_one_line_each_and_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffone\ttwo\r\n\n  \nthree\u2028four\none two\nthree\n".encode())
    texts = mining.read_texts(tmp_path / "x.txt", tmp_path / "kept")
    assert texts.read(slice(0, len(texts))) == ["one two", "three four", "three"]
    assert list(texts.at([2, 0])) == ["three", "one two"]


def test_cells_find_most_neighbours_and_all_if_all_are_probed() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    query, key = _unit(300, 1), _unit(3000, 2).astype(np.float16)
    cosine, place = nearest(query, key, 5)
    found, where = approximate.nearest_by_cells(query, key, 5, probes=10**6)
    np.testing.assert_allclose(found, cosine, atol=1e-5)
    assert approximate.recall(query, key, where) > 0.999
    _, few = approximate.nearest_by_cells(query, key, 5, probes=3)
    hits = [len(set(a) & set(b)) / 5 for a, b in zip(few.tolist(), place.tolist(), strict=True)]
    assert approximate.recall(query, key, few) == pytest.approx(np.mean(hits)) and 0.2 < np.mean(hits) < 0.999


def test_more_neighbours_than_keys_are_all_keys() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    a, b = np.abs(_unit(3, 1)), np.abs(_unit(2, 2))
    exact, cells = mined_pairs(a, b, How("ratio", 4)), mined_pairs(a, b, How("ratio", 4, "ivf"))
    np.testing.assert_allclose(exact.score, cells.score, atol=1e-2)
    assert len(exact.a) == 2


def test_each_mistake_is_one_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(approximate, "find_spec", lambda name: None)
    good, out = tmp_path / "good.txt", tmp_path / "out.tsv"
    good.write_text("The lamp is on.\n")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "broken.txt").write_bytes(b"one\ntwo\n\xff\n")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((good, tmp_path / "none.txt", out, "--model", model_folder), "none.txt: no such file"),
        ((good, tmp_path / "blank.txt", out, "--model", model_folder), "blank.txt has no text"),
        ((tmp_path / "broken.txt", good, out, "--model", model_folder), "broken.txt line 3: cannot be read"),
        ((good, good, out, "--model", tmp_path / "no"), "no is not there"),
        ((good, good, tmp_path, "--model", model_folder), f"{tmp_path} is a folder"),
        ((good, good, out, "--model", model_folder, "--search", "ivf"), "pip install 'infoxlm-ds[mining]'"),
        ((good, good, out, "--model", model_folder, "--neighbours", "0"), "--help`"),
    ]
    for arguments, message in cases:
        assert _mine(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("infoxlm: ")
    assert not list(tmp_path.glob("out.tsv*")) and not list(tmp_path.parent.glob("*.work"))
