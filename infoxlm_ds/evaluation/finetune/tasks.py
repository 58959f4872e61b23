"""The tasks: their labels, the names of their files, and the settings that XTREME (Hu et al. 2020) uses for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

Kind = Literal["pair", "token", "span"]
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
OWN = ("{language}/{split}", "{split}-{language}")  # names that every task takes, with .tsv or .json
POS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"


@dataclass(frozen=True)
class Task:
    """`labels`: all of them, in the order of the model's outputs; empty if they are those of the training files.
    `same`: other names of a label. `names`: patterns of file names below the data folder, of which the first one that
    exists is read; `shared`: files that hold all languages; `english`: files of English alone. The first of `metrics`
    chooses the best epoch. `sentences`: of an example of kind pair."""

    kind: Kind
    metrics: tuple[str, ...]
    epochs: int
    max_tokens: int
    labels: tuple[str, ...] = ()
    sentences: Literal[1, 2] = 2
    learning_rate: float = 2e-5
    batch_tokens: int = 1024
    rules: Literal["squad", "mlqa"] = "squad"  # by which answers are compared
    same: dict[str, str] = field(default_factory=dict)
    names: dict[Split, tuple[str, ...]] = field(default_factory=dict)
    shared: dict[Split, tuple[str, ...]] = field(default_factory=dict)
    english: dict[Split, tuple[str, ...]] = field(default_factory=dict)

    def patterns(self, split: Split) -> tuple[str, ...]:
        """Patterns of the names of a split's files, with `{language}` in them."""
        suffix = ".json" if self.kind == "span" else ".tsv"
        return (*self.names.get(split, ()), *(name.replace("{split}", split) + suffix for name in OWN))


def _each(*names: str) -> dict[Split, tuple[str, ...]]:
    return {split: tuple(name.replace("{split}", split) for name in names) for split in SPLITS}


def _squad(split: str) -> tuple[str, ...]:
    name = f"{split}-v1.1.json"
    return name, f"squad/{name}", f"../squad/{name}"  # the last one is XTREME's place


SQUAD: dict[Split, tuple[str, ...]] = {"train": _squad("train"), "dev": _squad("dev")}
MLQA = "{split}/{split}-context-{language}-question-{language}.json"
TYDIQA = "tydiqa-goldp-v1.1"
TYDIQA_DEV = f"{TYDIQA}-dev/tydiqa.goldp.{{language}}.dev.json"
_pair_task = partial(Task, "pair", ("accuracy",), 5, 128)
_answer_task = partial(Task, "span", ("f1", "exact"), 3, 384, learning_rate=3e-5, batch_tokens=6144)
TASKS = {
    "sentences": _pair_task(sentences=1),  # of the user, as the next
    "pairs": _pair_task(),
    "xnli": _pair_task(
        labels=("contradiction", "entailment", "neutral"),
        same={"contradictory": "contradiction"},  # in the translated training files
        names={"train": ("multinli.train.{language}.tsv", "XNLI-MT-1.0/multinli/multinli.train.{language}.tsv")},
        shared={split: (f"xnli.{split}.tsv", f"XNLI-1.0/xnli.{split}.tsv") for split in ("dev", "test")},
    ),
    "pawsx": _pair_task(
        labels=("0", "1"),
        names={
            "train": ("{language}/train.tsv", "{language}/translated_train.tsv"),
            "dev": ("{language}/dev_2k.tsv",),
            "test": ("{language}/test_2k.tsv",),
        },
    ),
    "ner": Task("token", ("f1",), 10, 128, names=_each("{language}/{split}")),
    "pos": Task(
        kind="token",
        metrics=("accuracy",),
        epochs=10,
        max_tokens=128,
        labels=tuple(POS.split()),
        names=_each(
            "{language}/{split}.conllu", "{language}_*-ud-{split}.conllu", "UD_*/{language}_*-ud-{split}.conllu"
        ),
    ),
    "mlqa": _answer_task(
        rules="mlqa",
        names=_each(MLQA, f"MLQA_V1/{MLQA}") | {"train": ("{language}_squad-translate-train-train-v1.1.json",)},
        english={"train": SQUAD["train"]},
    ),
    "xquad": _answer_task(
        names={"test": ("xquad.{language}.json",)},
        english=SQUAD,
    ),
    "tydiqa": _answer_task(
        names={
            "train": tuple(f"{TYDIQA}-train/{name}.{{language}}.train.json" for name in ("tydiqa", "tydiqa.goldp")),
            "dev": (TYDIQA_DEV,),
            "test": (TYDIQA_DEV,),  # the test files are not public
        },
        shared={
            "train": (f"{TYDIQA}-train.json", f"{TYDIQA}-train/{TYDIQA}-train.json"),
            "dev": (f"{TYDIQA}-dev.json",),
            "test": (f"{TYDIQA}-dev.json",),
        },
    ),
}
