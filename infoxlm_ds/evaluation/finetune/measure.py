"""Predicts the labels or answers of a split and scores them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.data.upload import to_device
from infoxlm_ds.evaluation.finetune.answers import answer_scores, mlqa_tokens, squad_tokens
from infoxlm_ds.evaluation.finetune.data import Measured
from infoxlm_ds.evaluation.finetune.items import NONE
from infoxlm_ds.evaluation.finetune.packing import collate, packed
from infoxlm_ds.evaluation.finetune.scores import SCORES
from infoxlm_ds.evaluation.finetune.task_model import TaskModel
from infoxlm_ds.evaluation.finetune.tasks import Task
from infoxlm_ds.evaluation.finetune.windows import Window, best_answer

Scores = dict[str, dict[str, float]]  # by metric and language


@torch.no_grad()
def _logits(model: TaskModel, split: Measured, tokens: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The numbers of the items of each batch, and their logits. `tokens`: of a batch."""
    model.eval()
    lengths = np.array([len(item.ids) for item in split.items])
    for numbers in packed(lengths, tokens, None):
        flat = collate([split.items[i] for i in numbers]).flat
        yield numbers, model.logits(to_device(flat, dist.device()))


def predict(model: TaskModel, split: Measured, labels: list[str], tokens: int) -> list[list[str]]:
    """The predicted labels of each example; of a question, the answer."""
    return _answers(model, split, tokens) if model.kind == "span" else _labels(model, split, labels, tokens)


def _labels(model: TaskModel, split: Measured, labels: list[str], tokens: int) -> list[list[str]]:
    of_item: list[list[str]] = [[] for _ in split.items]
    for numbers, logits in _logits(model, split, tokens):
        best, at = logits.argmax(-1).tolist(), 0
        for i in numbers:
            given = split.items[i].labels
            here, at = best[at : at + len(given)], at + len(given)
            of_item[i] = [labels[x] for x, label in zip(here, given, strict=True) if label != NONE]
    predicted: list[list[str]] = [[] for _ in split.examples]
    for item, found in zip(split.items, of_item, strict=True):
        predicted[item.example] += found
    return predicted


def _answers(model: TaskModel, split: Measured, tokens: int) -> list[list[str]]:
    best = [(-np.inf, "")] * len(split.examples)
    for numbers, logits in _logits(model, split, tokens):
        items = [split.items[i] for i in numbers]
        ends = np.cumsum([len(item.ids) for item in items])[:-1]
        for item, here in zip(items, np.split(logits.float().cpu().numpy(), ends), strict=True):
            assert isinstance(item, Window)
            found = best_answer(item, here, split.examples[item.example].texts[1])
            best[item.example] = max(best[item.example], found, key=lambda x: x[0])
    return [[text] for _, text in best]


def scores(model: TaskModel, by_language: dict[str, Measured], labels: list[str], task: Task, tokens: int) -> Scores:
    """The scores of each language, from 0 to 1."""
    found: Scores = {metric: {} for metric in task.metrics}
    for language, split in by_language.items():
        gold = [example.labels for example in split.examples]
        predicted = predict(model, split, labels, tokens)
        if task.kind == "span":
            of_language = answer_scores(
                gold, predicted, squad_tokens if task.rules == "squad" else partial(mlqa_tokens, language=language)
            )
        else:
            of_language = {metric: SCORES[metric](gold, predicted) for metric in task.metrics}
        for metric in task.metrics:
            found[metric][language] = of_language[metric]
    return found
