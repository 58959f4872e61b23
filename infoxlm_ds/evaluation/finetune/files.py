"""Finds and reads the files of a task: pairs and words here, questions by squad.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from infoxlm_ds.config import UserError
from infoxlm_ds.data.text import lines
from infoxlm_ds.evaluation.finetune.examples import Example
from infoxlm_ds.evaluation.finetune.squad import languages_of_questions, questions
from infoxlm_ds.evaluation.finetune.tasks import Split, Task

ENGLISH = "en"
CODE = r"[A-Za-z]{2,3}(?:[-_][A-Za-z]+)?"  # of a language
COLUMNS = {
    1: (("sentence", "label"), ("text", "label")),
    2: (("sentence1", "sentence2", "gold_label"), ("sentence1", "sentence2", "label"), ("premise", "hypo", "label")),
}


def languages_of(task: Task, folder: Path) -> list[str]:
    """The languages that have a test file: English, then the others by code. UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    found = {language for name in task.shared.get("test", ()) for language in _languages_in(task, folder / name)}
    for pattern in task.patterns("test"):
        form = re.escape(pattern).replace(r"\{language\}", f"({CODE})", 1).replace(r"\*", "[^/]*")
        form = form.replace(r"\{language\}", r"\1")
        for path in folder.glob(pattern.replace("{language}", "*")):
            if path.is_file() and (match := re.fullmatch(form, path.relative_to(folder).as_posix())):
                found.add(match[1])
    if not found:
        names = ", ".join((*task.shared.get("test", ()), *task.patterns("test"))).replace("{language}", "LANG")
        raise UserError(f"--data {folder}: no test file of a language there: expected {names}")
    return sorted(found, key=lambda language: (language != ENGLISH, language))


def _languages_in(task: Task, path: Path) -> set[str]:
    """The languages that a shared file holds."""
    if not path.is_file():
        return set()
    if task.kind == "span":
        return languages_of_questions(path)
    return {line.split("\t", 1)[0] for number, line in lines(path) if number > 1}


def read_split(task: Task, folder: Path, language: str, split: Split) -> list[Example]:
    """All examples of a language. UserError if there is no file, or if one is empty or cannot be understood."""
    for pattern in task.patterns(split):
        paths = sorted(folder.glob(pattern.replace("{language}", language)))
        if files := [path for path in paths if path.is_file()]:
            return [example for path in files for example in _read(task, path, None)]
    english = task.english.get(split, ()) if language == ENGLISH else ()
    for name in english:
        if (folder / name).is_file():
            return _read(task, folder / name, None)
    for name in task.shared.get(split, ()):
        if language in _languages_in(task, folder / name):
            return _read(task, folder / name, language)
    names = ", ".join((*english, *task.patterns(split), *task.shared.get(split, ()))).replace("{language}", language)
    others = "; --select chooses whose dev files are read" if split == "dev" else ""
    raise UserError(f"--data {folder}: no {split} file of {language}: expected one of {names}{others}")


def _read(task: Task, path: Path, language: str | None) -> list[Example]:
    if task.kind == "span":
        examples = list(questions(path, language))
    else:
        examples = list(_pairs(task, path, language) if task.kind == "pair" else _sentences(path))
    if not examples:
        raise UserError(f"{path}: no examples in it: give a file that is not empty")
    return examples


def _pairs(task: Task, path: Path, language: str | None) -> Iterator[Example]:
    """Lines of a TSV file, whose first line may name the columns; otherwise they are one or two sentences and a label.
    Those on whose label the annotators did not agree (-) are left out. `language`: only lines with it in the first
    column."""
    wide = task.sentences + 1
    columns = list(range(wide))
    for number, line in lines(path):
        fields = line.split("\t")
        if number == 1 and (names := _header(fields, task.sentences)):
            columns, wide = names, len(fields)
            continue
        if not line.strip() or (language is not None and fields[0] != language):
            continue
        if len(fields) != wide:
            raise UserError(
                f"{path} line {number}: {len(fields)} columns, expected {wide} with tabs between them: "
                f"{'two sentences' if task.sentences > 1 else 'a sentence'} and a label"
            )
        *sentences, label = (fields[column].strip() for column in columns)
        if label != "-":
            yield Example(path, [number], sentences, [task.same.get(label, label)])


def _header(fields: list[str], sentences: Literal[1, 2]) -> list[int] | None:
    for names in COLUMNS[sentences]:
        if set(names) <= set(fields):
            return [fields.index(name) for name in names]
    return None


def _sentences(path: Path) -> Iterator[Example]:
    """Sentences between blank lines, a word and its label in each line; or CoNLL-U."""
    words: list[tuple[int, str, str]] = []
    for number, line in lines(path):
        if not line.strip():
            if words:
                yield _sentence(path, words)
            words = []
        elif pair := _word(path, number, line):
            words.append((number, *pair))
    if words:
        yield _sentence(path, words)


def _word(path: Path, number: int, line: str) -> tuple[str, str] | None:
    """A word and its label. None if the line is a comment, a range of words or an empty node of CoNLL-U."""
    fields = line.split("\t")
    wide = 2
    if path.suffix == ".conllu":
        if line.startswith("#"):
            return None
        wide = 10
    if len(fields) != wide:
        raise UserError(f"{path} line {number}: {len(fields)} columns, expected {wide} with tabs between them")
    if wide == 10:
        return (fields[1], fields[3]) if fields[0].isdecimal() else None
    return _without_language(path, fields[0]), fields[1].strip()


def _without_language(path: Path, word: str) -> str:
    """A word without the language of its file, with which words of WikiANN begin: `en:word`."""
    head, _, rest = word.partition(":")
    return rest if rest and head in (path.parent.name, path.stem.rpartition("-")[2]) else word


def _sentence(path: Path, words: list[tuple[int, str, str]]) -> Example:
    numbers, texts, labels = zip(*words, strict=True)
    return Example(path, list(numbers), list(texts), list(labels))


def labels_of(task: Task, examples: list[Example]) -> list[str]:
    """The task's labels, or those of training examples. For a type of entities, B- and I- are always both there.
    Answers have none."""
    if task.labels or task.kind == "span":
        return list(task.labels)
    if task.kind == "pair":
        return sorted({label for example in examples for label in example.labels})
    tags = {label for example in examples for label in example.labels} - {"O"}
    for example in examples:
        for number, label in zip(example.numbers, example.labels, strict=True):
            if label != "O" and not re.fullmatch("[BI]-.+", label):
                raise UserError(f"{example.path} line {number}: label {label!r}: expected O, B-TYPE or I-TYPE")
    return ["O", *(f"{prefix}-{kind}" for kind in sorted({tag[2:] for tag in tags}) for prefix in "BI")]


def check_labels(examples: list[Example], labels: list[str]) -> None:
    """UserError for the first label that is not one of `labels`."""
    known = set(labels)
    for example in examples:
        for number, label in zip(example.numbers, example.labels, strict=True):
            if label not in known:
                raise UserError(
                    f"{example.path} line {number}: unknown label {label!r}: the labels are {', '.join(labels)}"
                )
