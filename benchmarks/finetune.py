"""Compares an epoch of fine-tuning with transformers' Trainer: CPU seconds of the training steps, without evaluation.
`python -m benchmarks.finetune`

All train the same model on the same pairs, as many in a batch on average, with dropout, AdamW and clipping. `Trainer`
pads each batch to its longest pair; `by length` is its sampler that puts pairs of similar length together. Each has its
own process, and they train an epoch in turn. A row has the median CPU seconds of an epoch, the median of the rounds'
ratios to ours, and the highest resident memory. A pair is an English text of the embedded corpus and its translation,
or that of another.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from transformers.utils.logging import set_verbosity_error

from benchmarks.cases import EMBEDDED, corpus_of
from benchmarks.processes import Group, cpu
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.evaluation.finetune.data import read_data
from infoxlm_ds.evaluation.finetune.settings import Settings
from infoxlm_ds.evaluation.finetune.tasks import TASKS
from infoxlm_ds.evaluation.finetune.training import start, train_epoch

RATE, CLIP = 2e-5, 1.0


def write_pairs(folder: Path, count: int) -> None:
    """PAWS-X's files."""
    with lzma.open(EMBEDDED / "kolibri.dev.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["text"] for line in file]
    rows = [{code: " ".join(text.split()) for code, text in row.items()} for row in rows if "en" in row]
    chance = random.Random(0)
    lines = ["id\tsentence1\tsentence2\tlabel"]
    for i, row in enumerate(chance.sample(rows, count)):
        label = chance.randrange(2)
        other = row if label else chance.choice(rows)
        lines.append(f"{i}\t{row['en']}\t{other[chance.choice(list(other))]}\t{label}")
    (folder / "en").mkdir(parents=True)
    for name in ("train", "dev_2k", "test_2k"):
        (folder / "en" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_model(folder: Path, layers: int, width: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus_of("short") / "tokenizer")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=258,
        type_vocab_size=1,
    )
    XLMRobertaForMaskedLM(config).save_pretrained(folder)


class Ours:
    def __init__(self, settings: Settings, rank: int, world: int) -> None:
        start_ranks()
        self._run = start(settings, 1, settings.out, read_data(settings))

    def epoch(self) -> float:
        return train_epoch(self._run)


class Transformers:
    def __init__(self, settings: Settings, pairs: int, by_length: bool, rank: int, world: int) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # the Trainer would add DistributedDataParallel
            del os.environ[name]
        set_verbosity_error()  # a new head is no news
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        data: list[dict[str, Any]] = []
        for example in read_data(settings).train:
            encoded = tokenizer(*example.texts, truncation=True, max_length=settings.max_tokens)
            data.append({**encoded, "labels": int(example.labels[0])})
        torch.manual_seed(1)
        arguments = TrainingArguments(
            output_dir=str(settings.out),
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=pairs,
            learning_rate=RATE,
            weight_decay=settings.weight_decay,
            max_grad_norm=CLIP,
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length" if by_length else "random",
            save_strategy="no",
            disable_tqdm=True,
        )
        self._trainer = Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(settings.model),
            args=arguments,
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
        )

    def epoch(self) -> float:
        return float(self._trainer.train().training_loss)


def mean_length(settings: Settings) -> float:
    """Tokens of a pair."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    texts = [example.texts for example in read_data(settings).train]
    return statistics.fmean(len(tokenizer(*x, truncation=True, max_length=settings.max_tokens)[0]) for x in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="pairs")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--quick", action="store_true", help="one round of a small model")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.examples, options.layers, options.width = 1, 64, 2, 64
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, Group() as group:
        folder = Path(temporary)
        write_model(folder / "model", options.layers, options.width)
        write_pairs(folder / "data", options.examples)
        places = (folder / "model", folder / "data", folder / "out")
        asked = Settings("pawsx", *places, options.rounds + 1, TASKS["pawsx"].max_tokens, learning_rate=RATE, clip=CLIP)
        mean = mean_length(asked)
        asked = Settings(**(vars(asked) | {"batch_tokens": round(options.batch * mean)}))
        running = {
            "ours": group.start(partial(Ours, asked)),
            "Trainer": group.start(partial(Transformers, asked, options.batch, False)),
            "Trainer, by length": group.start(partial(Transformers, asked, options.batch, True)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in running}
        peaks = dict.fromkeys(running, 0.0)
        for done in range(options.rounds + 1):
            for name, ranks in running.items():
                answers = ranks("epoch")
                peaks[name] = max(peaks[name], answers[0].peak)
                if done:  # the first one warms up
                    seconds[name].append(cpu(answers))
    print(
        f"{options.examples} pairs of {mean:.1f} tokens on average\n\n| | CPU s | ratio | peak MiB |\n|---|---|---|---|"
    )
    for name, found in seconds.items():
        ratio = statistics.median(x / ours for x, ours in zip(found, seconds["ours"], strict=True))
        print(f"| {name} | {statistics.median(found):.2f} | {ratio:.2f} | {peaks[name]:,.0f} |")


if __name__ == "__main__":
    main()
