"""`infoxlm embed`: a vector for each line, in order, from a file or a pipe, as npy or Parquet."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infoxlm_ds import cli
from infoxlm_ds.evaluation import vectors as module
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from tests.evaluation.tiny_xlmr import SENTENCES

LINES = [*SENTENCES, "", "a\u2028b\x0cc", " ".join(SENTENCES), "\U0001f600"]  # only \n ends a line


def _embed(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `infoxlm embed ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["infoxlm", "embed", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_bytes("\n".join(LINES).encode())
    return path


def test_a_pipe_gives_a_vector_for_each_line_and_nothing_else(model_folder: Path, text: Path) -> None:
    command = [sys.executable, "-c", "from infoxlm_ds.cli import main; main()", "embed", str(model_folder)]
    with text.open("rb") as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, check=True, env=dict(os.environ))
    vectors = np.load(io.BytesIO(done.stdout))
    np.testing.assert_array_equal(vectors, SentenceEmbedder(model_folder, device="cpu").embed(LINES)[0])
    assert b"13 vectors of width 32: layer 2, mean pooling" in done.stderr


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_vectors_do_not_depend_on_the_chunks(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    out = tmp_path / "vectors.npy"
    options = ("--layer", "1", "--pooling", "cls", "--device", "cpu", "--out", out)
    assert _embed(monkeypatch, model_folder, text, *options) == 0
    vectors = np.load(out, mmap_mode="r")
    assert vectors.dtype == np.float32 and vectors.shape == (13, 32)
    np.testing.assert_allclose(vectors, SentenceEmbedder(model_folder, 1, "cls").embed(LINES)[0], atol=1e-6)


def test_parquet_has_text_and_vector(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    monkeypatch.setattr(module, "CHUNK", 5)
    assert _embed(monkeypatch, model_folder, text, "--format", "parquet", "--out", tmp_path / "v.parquet") == 0
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table.column("text").to_pylist() == LINES
    vectors = np.array(table.column("vector").to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, SentenceEmbedder(model_folder).embed(LINES)[0], atol=1e-6)


def test_no_line_gives_no_vector_and_other_line_ends_are_none(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.txt").write_bytes(b"")
    assert _embed(monkeypatch, model_folder, tmp_path / "none.txt", "--out", tmp_path / "none.npy") == 0
    assert np.load(tmp_path / "none.npy").shape == (0, 32)
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfThe lamp is on.\r\n\r\n")
    assert _embed(monkeypatch, model_folder, tmp_path / "dos.txt", "--out", tmp_path / "dos.npy") == 0
    expected = SentenceEmbedder(model_folder).embed(["The lamp is on.", ""])[0]
    np.testing.assert_array_equal(np.load(tmp_path / "dos.npy"), expected)


def test_each_mistake_is_one_line_and_leaves_nothing(
    model_folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.txt").write_bytes(b"one\ntwo\n\xff\n")
    out = tmp_path / "out.npy"
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((model_folder, tmp_path / "broken.txt", "--out", out), "broken.txt, line 3: not UTF-8"),
        ((model_folder, tmp_path / "nowhere.txt", "--out", out), "nowhere.txt: no such file of text"),
        ((tmp_path / "nowhere", text, "--out", out), "nowhere is not there"),
        ((model_folder, text, "--layer", "9", "--out", out), "layer 9 is out of range"),
        ((model_folder, text, "--device", "tpu9", "--out", out), "device tpu9: "),
        ((model_folder, text, "--format", "csv", "--out", out), "--help`"),
    ]
    for arguments, message in cases:
        assert _embed(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("infoxlm: ")
    assert not list(tmp_path.glob("out.npy*"))


def test_a_terminal_gets_no_vectors(
    model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert _embed(monkeypatch, model_folder, text) == 2
    assert "with --out FILE or > FILE" in capsys.readouterr().err


def test_a_missing_pyarrow_is_named(
    model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert _embed(monkeypatch, model_folder, text, "--format", "parquet") == 2
    assert "pip install 'infoxlm-ds[parquet]'" in capsys.readouterr().err
