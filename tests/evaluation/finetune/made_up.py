"""Made-up tasks in three languages that a tiny model can learn, and one that nobody can."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from infoxlm_ds.evaluation.finetune.settings import Settings

LAMPS = {"en": "The lamp is on.", "de": "Das Licht ist an.", "ru": "Лампа включена."}
DOORS = {"en": "Open the door, please.", "de": "Bitte öffne die Tür.", "ru": "Откройте, пожалуйста, дверь."}
DOM, TOWER, FILLERS = "Dom", "Tower", ["the", "is", "in"]  # words whose first token says what they are


def write_pairs(folder: Path, wrong: bool = False, train: int = 120) -> None:
    """PAWS-X's files. A pair has label 1 if both sentences are the same. `wrong`: labels of training are by chance."""
    chance = random.Random(0)
    for language in LAMPS:
        (folder / language).mkdir(parents=True)
        for split, count in (("train", train), ("dev_2k", 24), ("test_2k", 40)):
            rows = ["id\tsentence1\tsentence2\tlabel"]
            for i in range(count):
                first, second = (chance.choice((LAMPS, DOORS))[language] for _ in range(2))
                label = chance.randrange(2) if wrong and split == "train" else int(first == second)
                rows.append(f"{i}\t{first}\t{second}\t{label}")
            (folder / language / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_words(folder: Path, train: int = 100) -> None:
    """WikiANN's files. DOM is an entity, also with TOWER after it."""
    chance = random.Random(0)
    for language in ("en", "de"):
        (folder / language).mkdir(parents=True)
        for split, count in (("train", train), ("dev", 12), ("test", 20)):
            lines = []
            for _ in range(count):
                for _ in range(chance.randrange(2, 5)):
                    lines.append(f"{language}:{chance.choice(FILLERS)}\tO")
                    if chance.random() < 0.5:
                        lines.append(f"{language}:{DOM}\tB-LOC")
                        lines += [f"{language}:{TOWER}\tI-LOC"] if chance.random() < 0.5 else []
                lines.append("")
            (folder / language / split).write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings(task: str, model: Path, data: Path, out: Path, **changes: Any) -> Settings:
    """Settings with which the tiny model learns in seconds."""
    usual: dict[str, Any] = {"epochs": 6, "max_tokens": 34, "learning_rate": 3e-3, "batch_tokens": 256, "dropout": 0.1}
    return Settings(task, model, data, out, **(usual | changes))


def question(key: str, context: str, answer: str, start: int | None = None, asked: str = "the door?") -> dict[str, Any]:
    """A paragraph of SQuAD's format with one question."""
    answers = [{"text": answer, "answer_start": context.index(answer) if start is None else start}]
    return {"context": context, "qas": [{"id": key, "question": asked, "answers": answers}]}


def write_json(path: Path, paragraphs: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}), encoding="utf-8")


def write_questions(folder: Path, train: int = 100) -> None:
    """SQuAD's and XQuAD's files. DOM is the answer. Half of the contexts are longer than the tiny model's window."""
    chance = random.Random(0)

    def paragraphs(count: int) -> list[dict[str, Any]]:
        made = []
        for i in range(count):
            words = [chance.choice(FILLERS) for _ in range(chance.choice((4, 24)))]
            words.insert(chance.randrange(len(words)), DOM)
            made.append(question(str(i), " ".join(words), DOM))
        return made

    write_json(folder / "train-v1.1.json", paragraphs(train))
    write_json(folder / "squad" / "dev-v1.1.json", paragraphs(12))
    for language in ("en", "de"):
        write_json(folder / f"xquad.{language}.json", paragraphs(20))
