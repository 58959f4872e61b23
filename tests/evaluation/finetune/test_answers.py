"""Scores of answers equal worked examples of the official scripts' rules."""

from __future__ import annotations

from functools import partial

import pytest

from infoxlm_ds.evaluation.finetune.answers import answer_scores, mlqa_tokens, squad_tokens


@pytest.mark.parametrize(
    ("text", "language", "tokens"),
    [
        ("The  Eiffel-Tower, a tower!", "en", ["eiffeltower", "tower"]),
        ("¿Los años de la Luna?", "es", ["años", "de", "luna"]),
        ("Der Turm des Königs", "de", ["turm", "königs"]),
        ("những con mèo của tôi", "vi", ["con", "mèo", "tôi"]),
        ("الكتاب الجديد", "ar", ["كتاب", "جديد"]),
        ("दिल्ली में।", "hi", ["दिल्ली", "में"]),
        ("在1990年, IBM 公司", "zh", ["在", "1990", "年", "ibm", "公", "司"]),
        ("The « tour »", "fr", ["the", "tour"]),
    ],
)
def test_tokens_by_the_rules_of_mlqa(text: str, language: str, tokens: list[str]) -> None:
    assert mlqa_tokens(text, language) == tokens


def test_tokens_by_the_rules_of_squad() -> None:
    assert squad_tokens("The an A. U.S. Army") == ["us", "army"]
    assert squad_tokens("Los « años »") == ["los", "«", "años", "»"]  # only ASCII punctuation, only English articles


def test_the_best_of_the_right_answers_counts() -> None:
    """F1 of the second question: 2 of 3 tokens of the answer and 2 of 2 of the second right one: 4 / 5."""
    gold = [["the lamp"], ["a red old door", "red door"], ["kitchen"]]
    found = answer_scores(gold, [["Lamp."], ["big red door"], ["bath"]], squad_tokens)
    assert found == pytest.approx({"f1": (1 + 0.8 + 0) / 3, "exact": 1 / 3})


def test_tokens_count_as_often_as_they_occur() -> None:
    found = answer_scores([["ho ho ho"]], [["ho ho"]], squad_tokens)
    assert found == pytest.approx({"f1": 0.8, "exact": 0.0})


def test_chinese_is_compared_by_characters() -> None:
    found = answer_scores([["北京大学"]], [["北京"]], partial(mlqa_tokens, language="zh"))
    assert found == pytest.approx({"f1": 2 * 2 / 6, "exact": 0.0})


def test_answers_of_nothing_but_articles_match_exactly_but_share_no_token() -> None:
    assert answer_scores([["the"]], [["a"]], squad_tokens) == {"f1": 0.0, "exact": 1.0}
