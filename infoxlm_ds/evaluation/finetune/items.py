"""Pairs, and sentences whose words have labels, as a model reads them. Those of questions are in windows.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infoxlm_ds.evaluation.finetune.examples import Example
from infoxlm_ds.evaluation.finetune.tasks import Kind

NONE = -100  # label of a token that has none
TOGETHER = 1024  # examples that are tokenised in one call


@dataclass(frozen=True)
class Item:
    """A sequence with special tokens, and its labels: one, one a token, or the first and the last token of an answer.
    `example`: the number of its example."""

    ids: np.ndarray  # [n] int32
    labels: list[int]
    example: int


def chunks(examples: Sequence[Example]) -> Iterator[tuple[int, Sequence[Example]]]:
    """Examples to be tokenised in one call, and the number of their first. A tokenizer's result takes far more memory
    than the ids."""
    for start in range(0, len(examples), TOGETHER):
        yield start, examples[start : start + TOGETHER]


def items_of(kind: Kind, examples: Sequence[Example], labels: list[str], tokenizer: Any, longest: int) -> list[Item]:
    """The items of examples, with at most `longest` tokens. Pairs are cut; a long sentence with labels of words becomes
    several items, so that every word is judged."""
    number = {label: i for i, label in enumerate(labels)}
    items: list[Item] = []
    if kind == "pair":
        for start, some in chunks(examples):
            sides = [list(texts) for texts in zip(*(example.texts for example in some), strict=True)]
            encoded = tokenizer(*sides, truncation=True, max_length=longest)["input_ids"]
            for i, ids in enumerate(encoded):
                items.append(Item(np.array(ids, np.int32), [number[some[i].labels[0]]], start + i))
        return items
    for i, example in enumerate(examples):
        words = [word if tokenizer.tokenize(word) else tokenizer.unk_token for word in example.texts]
        items += _of_words(words, [number[label] for label in example.labels], tokenizer, longest, i)
    return items


def _of_words(words: list[str], labels: list[int], tokenizer: Any, longest: int, example: int) -> list[Item]:
    """The items of a sentence. The label of a word stands at its first token."""
    encoded = tokenizer(words, is_split_into_words=True, verbose=False)
    if len(encoded["input_ids"]) > longest and len(words) > 1:
        half = len(words) // 2
        parts = ((words[:half], labels[:half]), (words[half:], labels[half:]))
        return [item for part in parts for item in _of_words(*part, tokenizer, longest, example)]
    of_token, seen = [], -1
    for word in encoded.word_ids():
        of_token.append(NONE if word is None or word <= seen else labels[word])
        seen = seen if word is None else word
    ids = encoded["input_ids"]
    if len(ids) > longest:  # one very long word
        ids, of_token = [*ids[: longest - 1], ids[-1]], [*of_token[: longest - 1], NONE]
    return [Item(np.array(ids, np.int32), of_token, example)]
