"""Windows cover a long context, labels say where the answer is, and the best answer is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from infoxlm_ds.evaluation.finetune.examples import Example
from infoxlm_ds.evaluation.finetune.items import items_of
from infoxlm_ds.evaluation.finetune.windows import Window, best_answer, windows_of
from tests.evaluation.tiny_xlmr import SENTENCES

CONTEXT = " ".join(SENTENCES)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


def _example(answer: str, asked: str = "Is the lamp on?") -> Example:
    return Example(Path("x"), [CONTEXT.index(answer)], [asked, CONTEXT], [answer])


def _logits(window: Window, first: int, last: int) -> np.ndarray:
    logits = np.zeros((len(window.ids), 2), np.float32)
    logits[first, 0] = logits[last, 1] = 5
    return logits


@pytest.mark.parametrize("answer", ["lamp", "kitchen is 21", "дверь", "Küche beträgt 21 Grad."])
@pytest.mark.parametrize("longest", [24, 34, 384])
def test_windows_cover_the_context_and_mark_the_answer(tokenizer: Any, answer: str, longest: int) -> None:
    example = _example(answer)
    windows = windows_of([example], tokenizer, longest)
    assert all(len(window.ids) <= longest for window in windows) and (len(windows) > 1) == (longest < 384)
    covered = {char for window in windows for begin, end in window.offsets for char in range(begin, end)}
    assert {i for i, char in enumerate(CONTEXT) if char != " "} <= covered
    marked = [window for window in windows if window.labels != [0, 0]]
    whole = [x for x in windows if x.offsets[0, 0] <= example.numbers[0] <= x.offsets[-1, 1] - len(answer)]
    assert marked == whole and (longest < 384 or marked)
    for window in marked:
        assert best_answer(window, _logits(window, *window.labels), CONTEXT) == (10, answer)


def test_the_best_answer_is_that_of_trying_all(tokenizer: Any) -> None:
    """An answer lies in the context, does not end before it begins, and has at most 30 tokens."""
    (window,) = windows_of([_example("lamp")], tokenizer, 384)
    logits = np.random.default_rng(0).normal(size=(len(window.ids), 2))
    last = window.first + len(window.offsets)
    spans = [(a, b) for a in range(window.first, last) for b in range(a, min(a + 30, last))]
    score, (a, b) = max((logits[a, 0] + logits[b, 1], (a, b)) for a, b in spans)
    text = CONTEXT[window.offsets[a - window.first, 0] : window.offsets[b - window.first, 1]].strip()
    found = best_answer(window, logits, CONTEXT)
    assert found[0] == pytest.approx(score) and found[1] == text


def test_a_long_question_is_cut_and_an_empty_context_has_no_window(tokenizer: Any) -> None:
    examples = [_example("lamp", asked=CONTEXT), Example(Path("x"), [0], ["Is it?", "  "], [""])]
    windows = windows_of(examples, tokenizer, 34)
    assert {window.example for window in windows} == {0}
    assert all(window.first < 34 // 3 + 4 for window in windows)


def test_every_word_of_a_long_sentence_keeps_its_label(tokenizer: Any) -> None:
    words = CONTEXT.split()
    labels = [f"{i % 3}" for i in range(len(words))]
    example = Example(Path("x"), list(range(len(words))), words, labels)
    items = items_of("token", [example], ["0", "1", "2"], tokenizer, 34)
    assert len(items) > 1 and all(len(item.ids) == len(item.labels) <= 34 for item in items)
    assert [x for item in items for x in item.labels if x >= 0] == [i % 3 for i in range(len(words))]
