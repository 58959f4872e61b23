"""Reads questions in the format of SQuAD v1.1, which MLQA, XQuAD and TyDiQA-GoldP have too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.finetune.examples import Example

# How ids of TyDiQA-GoldP begin.
LANGUAGES = {
    **{"arabic": "ar", "bengali": "bn", "english": "en", "finnish": "fi", "indonesian": "id", "japanese": "ja"},
    **{"korean": "ko", "russian": "ru", "swahili": "sw", "telugu": "te", "thai": "th"},
}


def languages_of_questions(path: Path) -> set[str]:
    """The languages of the questions in a file whose ids begin with a language."""
    return {LANGUAGES[name] for key, _ in _rows(path) if (name := _name(key)) in LANGUAGES}


def questions(path: Path, language: str | None) -> Iterator[Example]:
    """The questions of a file. `language`: only those whose id begins with it. UserError if the file is not in this
    format, or if an answer lies outside its context."""
    for key, example in _rows(path):
        if language is None or LANGUAGES.get(_name(key)) == language:
            yield example


def _name(key: str) -> str:
    return key.partition("-")[0]


def _rows(path: Path) -> Iterator[tuple[str, Example]]:
    """Ids and questions."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield str(question["id"]), _example(path, paragraph["context"], question)
    except KeyError as error:
        raise UserError(f"{path}: not in the format of SQuAD v1.1: {error} is missing") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not in the format of SQuAD v1.1: {str(error)[:200]}") from None


def _example(path: Path, context: str, question: dict[str, Any]) -> Example:
    where = f"{path}: question {str(question['id'])[:100]}"
    if not question["answers"]:
        raise UserError(f"{where} has no answer: questions without an answer (SQuAD v2) cannot be used")
    texts = [answer["text"] for answer in question["answers"]]
    starts = [answer["answer_start"] for answer in question["answers"]]
    for text in (question["question"], context, *texts):
        if not isinstance(text, str):
            raise TypeError(f"{str(text)[:100]} is not a text")
        text.encode()  # a ValueError if it holds half of a surrogate pair
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(start, int):
            raise TypeError(f"answer_start {str(start)[:100]} is not a whole number")
        if not 0 <= start <= len(context) - len(text):
            raise UserError(f"{where}: answer {text[:100]!r} at {start} does not lie in its context")
    return Example(path, starts, [question["question"], context], texts)


def in_place(example: Example) -> bool:
    """Whether the first answer is what the context has at its place. Spaces and letter case do not matter."""
    _, context = example.texts
    start, answer = example.numbers[0], example.labels[0]
    found = context[start : start + len(answer)]
    return bool(answer.strip()) and found.casefold().split() == answer.casefold().split()
