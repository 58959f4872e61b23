"""Questions as a model reads them: a long context becomes several windows, which overlap. The best answer of all of
them counts.

Legend: n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infoxlm_ds.evaluation.finetune.examples import Example
from infoxlm_ds.evaluation.finetune.items import Item, chunks

QUESTION, OVERLAP, ANSWER = 64, 128, 30  # tokens at most; those of XTREME


@dataclass(frozen=True)
class Window(Item):
    """A question and a part of its context. `first`: the place of the part's first token. `offsets` [n, 2]: where the
    tokens of the part begin and end in the context."""

    first: int
    offsets: np.ndarray


def windows_of(examples: Sequence[Example], tokenizer: Any, longest: int) -> list[Window]:
    """The windows of questions, with at most `longest` tokens. In a window without the whole answer, the label is the
    first token of the sequence."""
    most, overlap = min(QUESTION, longest // 3), min(OVERLAP, longest // 3)
    windows: list[Window] = []
    for start, some in chunks(examples):
        asked = _cut([example.texts[0] for example in some], tokenizer, most)
        encoded = tokenizer(
            asked,
            [example.texts[1] for example in some],
            truncation="only_second",
            max_length=longest,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, number in enumerate(encoded["overflow_to_sample_mapping"]):
            places = [place for place, side in enumerate(encoded.sequence_ids(i)) if side == 1]
            if places:  # a context of nothing but spaces has no tokens
                offsets = np.array(encoded["offset_mapping"][i], np.int32)[places]
                ids, labels = np.array(encoded["input_ids"][i], np.int32), _labels(some[number], offsets, places[0])
                windows.append(Window(ids, labels, start + number, places[0], offsets))
    return windows


def _cut(questions: list[str], tokenizer: Any, most: int) -> list[str]:
    ends = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [x if len(at) <= most else x[: at[most - 1][1]] for x, at in zip(questions, ends, strict=True)]


def _labels(example: Example, offsets: np.ndarray, first: int) -> list[int]:
    """The first and the last token of the first answer, by their places in the sequence."""
    begin, end = example.numbers[0], example.numbers[0] + len(example.labels[0])
    if begin < offsets[0, 0] or end > offsets[-1, 1]:
        return [0, 0]
    return [first + int(np.argmax(offsets[:, 1] > begin)), first + int(np.flatnonzero(offsets[:, 0] < end)[-1])]


def best_answer(window: Window, logits: np.ndarray, context: str) -> tuple[float, str]:
    """The score and the text of the best answer in a window. `logits` [n, 2]: of its tokens, to begin and to end an
    answer."""
    begins, ends = logits[window.first : window.first + len(window.offsets)].T
    count = len(begins)
    totals = np.full((min(ANSWER, count), count), -np.inf)  # by length less 1, and first token
    for more, row in enumerate(totals):
        row[: count - more] = begins[: count - more] + ends[more:]
    more, first = divmod(int(totals.argmax()), count)
    text = context[window.offsets[first, 0] : window.offsets[first + more, 1]]
    return float(totals[more, first]), text.strip()
