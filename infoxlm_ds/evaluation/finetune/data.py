"""Reads all files of a fine-tuning and makes the items, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.finetune.examples import Example
from infoxlm_ds.evaluation.finetune.files import ENGLISH, check_labels, labels_of, languages_of, read_split
from infoxlm_ds.evaluation.finetune.items import Item, items_of
from infoxlm_ds.evaluation.finetune.settings import Settings
from infoxlm_ds.evaluation.finetune.squad import in_place
from infoxlm_ds.evaluation.finetune.tasks import Split
from infoxlm_ds.evaluation.finetune.windows import windows_of


@dataclass(frozen=True)
class Data:
    """Training examples, and dev and test examples by language."""

    labels: list[str]
    train: list[Example]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]


@dataclass(frozen=True)
class Measured:
    """A split to be measured: its examples, and their items."""

    examples: list[Example]
    items: Sequence[Item]


@dataclass(frozen=True)
class Prepared:
    """Items for one tokenizer."""

    labels: list[str]
    train: Sequence[Item]
    dev: dict[str, Measured]
    test: dict[str, Measured]


def read_data(settings: Settings) -> Data:
    """All that the settings name. UserError for the first file that is missing or wrong, or label that is not known."""
    task, folder = settings.of_task, settings.data
    there = languages_of(task, folder)
    if missing := [language for language in settings.languages if language not in there]:
        raise UserError(f"--languages {missing[0]}: no test file in {folder}: there are {', '.join(there)}")
    languages = list(settings.languages or there)

    def of_all(split: Split, chosen: Iterable[str]) -> dict[str, list[Example]]:
        return {language: read_split(task, folder, language, split) for language in chosen}

    train = [example for examples in of_all("train", settings.train_languages).values() for example in examples]
    if task.kind == "span":
        train = _with_their_answers(train)
    labels = labels_of(task, train)
    data = Data(labels, train, of_all("dev", selected_on(settings, languages)), of_all("test", languages))
    if task.kind != "span":
        for examples in (train, *data.dev.values(), *data.test.values()):
            check_labels(examples, labels)
    return data


def _with_their_answers(train: list[Example]) -> list[Example]:
    """The questions whose answer lies where the file says. Machine translation does not always keep it there."""
    kept = [example for example in train if in_place(example)]
    if not kept:
        raise UserError(f"{train[0].path}: no answer lies where answer_start says: it counts characters from 0")
    if len(kept) < len(train):
        print(f"{len(train) - len(kept)} of {len(train)} training questions have a misplaced answer: left out")
    return kept


def selected_on(settings: Settings, languages: list[str]) -> list[str]:
    """The languages whose dev files choose the best epoch. UserError if there are none."""
    if settings.select == "english":
        return [ENGLISH]
    if settings.select == "train":
        return list(settings.train_languages)
    targets = [language for language in languages if language not in settings.train_languages]
    if not targets:
        raise UserError("--select target: all evaluated languages are trained on: give more --languages")
    return targets


def prepare(data: Data, settings: Settings, tokenizer: Any, longest: int) -> Prepared:
    """The items of all examples, with at most `longest` tokens each."""
    kind = settings.of_task.kind

    def items(examples: list[Example]) -> Sequence[Item]:
        if kind == "span":
            return windows_of(examples, tokenizer, longest)
        return items_of(kind, examples, data.labels, tokenizer, longest)

    def measured(split: dict[str, list[Example]]) -> dict[str, Measured]:
        return {language: Measured(examples, items(examples)) for language, examples in split.items()}

    return Prepared(data.labels, items(data.train), measured(data.dev), measured(data.test))
