"""BUCC: threshold and F1 by hand, files as BUCC ships them, and one line for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from infoxlm_ds import cli
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.evaluation.bucc import BuccRow, Judged, best_threshold, measured
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.output import write_json
from infoxlm_ds.shipped import EMBEDDED


def _judged(scores: list[float], right: list[int], gold: int) -> Judged:
    return Judged(np.array(scores), np.array(right, bool), gold)


def test_threshold_and_f1_by_hand() -> None:
    """Four gold pairs, three of them mined. F1 after 1 to 5 pairs: 2/5, 4/6, 4/7, 6/8, 6/9."""
    judged = _judged([1.4, 1.3, 1.2, 1.1, 0.8], [1, 1, 0, 1, 0], 4)
    threshold = best_threshold(judged)
    assert threshold == pytest.approx(0.95)
    assert measured(judged, threshold) == pytest.approx((4, 3 / 4, 3 / 4, 3 / 4))
    other = _judged([1.2, 0.96, 0.9], [1, 0, 1], 5)
    assert measured(other, threshold) == pytest.approx((2, 1 / 2, 1 / 5, 2 / 7))


def test_a_threshold_does_not_part_equal_scores() -> None:
    """Of the two pairs with the score 1, one is wrong: F1 is 1 if they are parted, which no threshold can do."""
    judged = _judged([2, 1, 1, 0.5], [1, 1, 0, 0], 2)
    assert best_threshold(judged) == pytest.approx(0.75)
    assert measured(judged, 0.75) == pytest.approx((3, 2 / 3, 1, 4 / 5))


def test_nothing_right_is_zero_and_all_right_is_one() -> None:
    wrong = _judged([2, 1], [0, 0], 3)
    assert measured(wrong, best_threshold(wrong)) == (0, 0, 0, 0)
    right = _judged([2, 1], [1, 1], 2)
    assert measured(right, best_threshold(right)) == (2, 1, 1, 1)


def _write(folder: Path, part: str, rows: list[dict[str, str]], gold: int) -> None:
    """`gold` pairs, the English ones in the reverse order; the other rows have one side each."""
    rest = rows[gold:]
    texts = {
        "de": [row["de"] for row in rows[:gold] + rest[::2]],
        "en": [row["en"] for row in rest[1::2] + rows[:gold][::-1]],
    }
    for code, of_side in texts.items():
        lines = [f"{code}-{number:09}\t{text}\n" for number, text in enumerate(of_side)]
        (folder / f"de-en.{part}.{code}").write_text("".join(lines), encoding="utf-8")
    last = len(texts["en"]) - 1
    lines = [f"de-{number:09}\ten-{last - number:09}\n" for number in range(gold)]
    (folder / f"de-en.{part}.gold").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "bucc2018" / "de-en"
    folder.mkdir(parents=True)
    rows = [row for row in read_nway(EMBEDDED / "wagtail.dev.jsonl.xz") if {"en", "de"} <= set(row)]
    rows = [row for row in rows if len(row["en"]) <= 30]  # the model cuts longer ones
    unique = list({row["en"]: row for row in {row["de"]: row for row in rows}.values()}.values())
    # The same sentence on both sides is found by any encoder.
    same = [{"en": row["en"], "de": row["en"]} for row in unique[:40]]
    _write(folder, "training", same[:20] + unique[40:100], 20)
    _write(folder, "test", same[20:] + unique[100:160], 20)
    return tmp_path


def _bucc(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `infoxlm eval bucc ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["infoxlm", "eval", "bucc", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_rows_are_json_also_without_a_right_pair(tmp_path: Path) -> None:
    """JSON has no infinity, and other readers than Python's refuse it."""
    threshold = best_threshold(_judged([1.4, 1.3], [0, 0], 4))
    write_json(tmp_path / "rows.json", [BuccRow("de", "test", "training", "ratio", threshold, 4, 0, 0.0, 0.0, 0.0)])
    (row,) = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)
    assert row["threshold"] is None and row["gold"] == 4


def test_files_of_bucc_become_a_table_and_rows(
    data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data / "rows.json"
    assert _bucc(monkeypatch, "--model", model_folder, "--data", data, "--json", out) == 0
    assert "precision" in (shown := capsys.readouterr().out) and "too good" not in shown
    (row,) = json.loads(out.read_text())
    assert (row["language"], row["part"], row["tuned_on"], row["gold"]) == ("de", "test", "training", 20)
    assert row["f1"] == pytest.approx(2 * row["precision"] * row["recall"] / (row["precision"] + row["recall"]))
    assert row["recall"] > 0.5


def test_one_part_with_gold_is_used_twice_and_that_is_said(
    data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "bucc2018" / "de-en" / "de-en.test.gold").unlink()
    out = data / "rows.json"
    assert _bucc(monkeypatch, "--model", model_folder, "--data", data, "--json", out) == 0
    assert "too good" in " ".join(capsys.readouterr().out.split())
    (row,) = json.loads(out.read_text())
    assert row["part"] == row["tuned_on"] == "training"


def test_each_mistake_is_one_line(
    data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*options: str | Path) -> str:
        assert _bucc(monkeypatch, "--model", model_folder, *options) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    folder = data / "bucc2018" / "de-en"
    assert "no such folder" in error("--data", data / "none")
    (data / "fr-en.training.gold").touch()  # the last language is read before the first is embedded
    with monkeypatch.context() as context:
        context.setattr(SentenceEmbedder, "embed", None)
        assert "fr-en.training.fr: no such file" in error("--data", data)
    (data / "fr-en.training.gold").unlink()
    assert "has gold pairs of test, training only" in error("--data", data, "--tune", "x", "--part", "y")
    (folder / "de-en.training.gold").write_text("de-000000000\ten-999999999\n")
    assert "de-en.training.gold line 1: expected two ids" in error("--data", data)
    (folder / "de-en.training.de").write_text("de-000000000 no tab\n")
    assert "de-en.training.de line 1: expected an id, a tab and a text" in error("--data", data)
    (folder / "de-en.training.de").unlink()
    assert "de-en.training.de: no such file" in error("--data", data)
    for path in folder.glob("*.gold"):
        path.unlink()
    assert "no gold pairs" in error("--data", data)
