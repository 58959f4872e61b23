"""What a fine-tuning was asked to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.finetune.tasks import TASKS, Task

FILE = "settings.json"
MAY_CHANGE = ("seeds", "out")  # between two starts


@dataclass(frozen=True)
class Settings:
    """`languages`: to evaluate; empty: all that have a test file. `select`: by which dev score the best epoch is
    chosen: English, or the mean of the languages of training, or of the evaluated ones that are not trained on.
    `patience`: epochs without a better score before a seed ends. `warmup`: a share of all steps."""

    task: str
    model: Path
    data: Path
    out: Path
    epochs: int
    max_tokens: int
    train_languages: tuple[str, ...] = ("en",)
    languages: tuple[str, ...] = ()
    seeds: int = 1
    select: Literal["english", "train", "target"] = "english"
    patience: int | None = None
    learning_rate: float = 2e-5
    batch_tokens: int = 1024
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: float = 0.1

    @property
    def of_task(self) -> Task:
        """The entry of the table of tasks."""
        return TASKS[self.task]


def keep_settings(settings: Settings) -> None:
    """Write the settings into the result folder. UserError if it has results of other settings, or cannot
    be written."""
    now = {key: value for key, value in asdict(settings).items() if key not in MAY_CHANGE}
    text = json.dumps(now, indent=1, default=str, ensure_ascii=False) + "\n"
    path = settings.out / FILE
    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"--out {settings.out} is a file: give a folder")
    if path.is_file() and any(settings.out.glob("seed-*")):
        try:
            before, asked = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
            changed = sorted(key for key in asked if before.get(key) != asked[key])
        except (ValueError, AttributeError):
            raise UserError(f"{path} cannot be read: remove the folder, or give another --out") from None
        if changed:
            raise UserError(f"--out {settings.out} has results with another {', '.join(changed)}: give another folder")
        return
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise UserError(f"--out {settings.out} cannot be written: {error.strerror}") from None
