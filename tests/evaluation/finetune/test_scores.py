"""Scores equal those of scikit-learn and seqeval; means, deviations and the gap are those of a sheet of paper."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from rich.console import Console
from seqeval.metrics import f1_score
from sklearn.metrics import accuracy_score

from infoxlm_ds.evaluation.finetune.results import print_results, summarize, with_means
from infoxlm_ds.evaluation.finetune.scores import accuracy, entities, entity_f1
from tests.evaluation.finetune.made_up import settings

TAGS = ("O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_those_of_the_packages(seed: int) -> None:
    chance = random.Random(seed)
    gold, predicted = ([[chance.choice(TAGS) for _ in range(1 + n % 7)] for n in range(30)] for _ in range(2))
    assert entity_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted))
    flat = [[tag for tags in side for tag in tags] for side in (gold, predicted)]
    assert accuracy(gold, predicted) == pytest.approx(accuracy_score(*flat))


def test_entities_of_a_worked_example() -> None:
    assert entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]) == {
        ("PER", 0, 2),
        ("LOC", 3, 4),
        ("LOC", 4, 5),
        ("PER", 5, 6),
    }


def test_no_entities_give_0() -> None:
    assert entity_f1([["O", "O"]], [["O", "O"]]) == 0.0
    assert entity_f1([["B-PER"]], [["O"]]) == 0.0


def test_the_gap_is_english_minus_the_mean_of_the_others() -> None:
    found = with_means({"en": 0.8, "de": 0.7, "sw": 0.5})
    assert found["gap"] == pytest.approx(0.8 - (0.7 + 0.5) / 2) and found["avg"] == pytest.approx(2 / 3)
    assert "gap" not in with_means({"en": 0.8}) and "gap" not in with_means({"de": 0.8, "sw": 0.7})


def test_a_row_of_all_languages_of_xnli_is_one_line() -> None:
    codes = ["en", "fr", "es", "de", "el", "bg", "ru", "tr", "ar", "vi", "th", "zh", "hi", "sw", "ur"]
    chosen, printed = settings("xnli", Path("models/mine"), Path("d"), Path("o")), io.StringIO()
    summary = summarize(chosen, [{"test": {"accuracy": dict.fromkeys(codes, 0.5)}}])
    print_results(summary, Console(file=printed, width=80))
    header, row = printed.getvalue().splitlines()[1:3]
    assert header.split() == ["model", *codes, "avg", "gap"]
    assert row.split() == ["mine", *["50.0"] * 16, "0.0"]


def test_mean_and_deviation_over_seeds() -> None:
    seeds = [{"test": {"accuracy": {"en": en, "de": de}}} for en, de in ((0.8, 0.6), (0.9, 0.6), (0.7, 0.6))]
    found = summarize(settings("pawsx", Path("m"), Path("d"), Path("o")), seeds)
    assert found["mean"]["accuracy"] == pytest.approx({"en": 0.8, "de": 0.6, "avg": 0.7, "gap": 0.2})
    assert found["std"]["accuracy"] == pytest.approx({"en": 0.1, "de": 0.0, "avg": 0.05, "gap": 0.1})
