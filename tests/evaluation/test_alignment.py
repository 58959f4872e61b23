"""Word alignment: the error rate of a worked example, the forms of gold files, links of a model, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infoxlm_ds import cli
from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.alignment import Gold, Scores, mutual_links, read_gold, read_pairs


def test_the_error_rate_of_an_example_worked_by_hand() -> None:
    """|A| = 4, |S| = 3, |A and S| = 2, |A and P| = 3: 1 - 5 / 7. A perfect alignment may have possible links."""
    gold = Gold({(0, 0), (1, 1), (2, 2)}, {(0, 0), (1, 1), (2, 2), (3, 2)})
    scores = Scores()
    scores.add({(0, 0), (1, 1), (3, 2), (2, 0)}, gold)
    row = scores.row(8)
    assert (row.precision, row.recall, row.error_rate) == pytest.approx((3 / 4, 2 / 3, 1 - 5 / 7))
    perfect = Scores()
    perfect.add(gold.sure, gold)
    perfect.add(gold.possible, gold)
    assert perfect.row(8).error_rate == 0 and perfect.row(8).pairs == 2


def test_words_are_linked_if_their_tokens_are_each_others_nearest() -> None:
    one = np.eye(4, dtype=np.float32)[:3]  # three tokens of two words
    other = np.eye(4, dtype=np.float32)[[2, 0, 3]]  # the last is near to none
    assert mutual_links(one, other, np.array([0, 0, 1]), np.array([0, 1, 2])) == {(1, 0), (0, 1)}
    assert mutual_links(one[:0], other, np.array([], int), np.array([0, 1, 2])) == set()


def test_both_forms_of_gold_files_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("0-0 1p1 1-2\n\n0?0 1-0\n")
    (tmp_path / "naacl").write_text("1 1 1 S\n1 2 2 P\n1 2 3\n\n3 1 1 P\n3 2 1 S\n\n")
    lengths = [(2, 3), (1, 1), (2, 1)]
    found = read_gold(tmp_path / "lines", 0, lengths)
    assert found == read_gold(tmp_path / "naacl", 1, lengths)
    assert found[0] == Gold({(0, 0), (1, 2)}, {(0, 0), (1, 1), (1, 2)}) and found[1] == Gold(set(), set())


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ("0-0\n0-0\n0-0", "line 3: the texts have 2 sentence pairs only"),
        ("0-0", "has links of 1 sentence pairs, but the texts have 2"),
        ("0-0 1:1\n", "line 1: '1:1' is no link"),
        ("1-2\n", "no words 1 and 2 in sentence 1, whose sides have 2 and 2: is the first word number 1?"),
        ("3 1 1", "sentence 3, but the texts have 2"),
        ("0p0\n", "has no sure link"),
    ],
)
def test_mistakes_in_gold_files_are_told(tmp_path: Path, gold: str, message: str) -> None:
    (tmp_path / "gold").write_text(gold + "\n")
    with pytest.raises(UserError) as caught:
        read_gold(tmp_path / "gold", 0, [(2, 2), (1, 1)])
    assert message in str(caught.value)


def test_texts_that_are_not_aligned_are_told(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a b\nc\n")
    (tmp_path / "other").write_text("d\n")
    with pytest.raises(UserError, match="other ends before line 2"):
        read_pairs(tmp_path / "one", tmp_path / "other")


def test_equal_sentences_are_aligned_word_by_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    sentences = ["the lamp is on", "open the kitchen door", ""]
    (tmp_path / "text").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    (tmp_path / "gold").write_text("0-0 1-1 2-2 3-3\n" * 2 + "\n")
    text, gold = tmp_path / "text", tmp_path / "gold"
    options = ("--model", model_folder, "--text", text, text, "--gold", gold, "--json", tmp_path / "out.json")
    monkeypatch.setattr("sys.argv", ["infoxlm", "eval", "alignment", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and "error rate" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["layer"] for row in rows] == [0, 1, 2, 3] and all(row["error_rate"] == 0 for row in rows)
