"""Compares sentence vectors with SentenceTransformer.encode: CPU seconds for the same texts and weights.
`python -m benchmarks.embed`

sentence-transformers sorts texts by length too, and pads each batch to its longest. Each has its own process, and they
embed all texts in turn. A row has sentences a CPU second, the median of the rounds' ratios to ours, and the highest
resident memory; the vectors are compared first. `--model` is any folder that both load.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks.cases import EMBEDDED
from benchmarks.finetune import write_model
from benchmarks.processes import Group, cpu
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.families import positions_of

BATCHES = (32, 128)  # sentence-transformers' default, and ours


def read_texts(name: str, count: int) -> list[str]:
    """So many texts of all languages of an embedded file."""
    with lzma.open(EMBEDDED / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [text for line in file for text in json.loads(line)["text"].values()]
    return random.Random(0).sample(texts, min(count, len(texts)))


class Ours:
    def __init__(self, folder: Path, texts: list[str], rank: int, world: int) -> None:
        self._embedder, self._texts = SentenceEmbedder(folder, pooling="mean"), texts

    def embed(self) -> np.ndarray:
        return self._embedder.embed(self._texts, description="", quiet=True)[0]


class SentenceTransformers:
    def __init__(self, folder: Path, texts: list[str], batch: int, longest: int, rank: int, world: int) -> None:
        from sentence_transformers import SentenceTransformer

        self._model, self._texts, self._batch = SentenceTransformer(str(folder)), texts, batch
        self._model.max_seq_length = longest

    def embed(self) -> np.ndarray:
        return self._model.encode(
            self._texts, batch_size=self._batch, normalize_embeddings=True, show_progress_bar=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--data", default="kolibri.dev", help="an embedded text")
    parser.add_argument("--model", type=Path, help="default: a random model of six layers of width 384")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, Group() as group:
        if options.model is None:
            options.model = Path(temporary)
            write_model(options.model, layers=6, width=384)
        texts = read_texts(options.data, options.texts)
        longest = positions_of(AutoConfig.from_pretrained(options.model))
        running = {"ours": group.start(partial(Ours, options.model, texts))}
        for batch in BATCHES:
            name = f"sentence-transformers, batch {batch}"
            running[name] = group.start(partial(SentenceTransformers, options.model, texts, batch, longest))
        first = {name: ranks("embed")[0].value for name, ranks in running.items()}  # also warms up
        worst = max(float(np.abs(vectors - first["ours"]).max()) for vectors in first.values())
        seconds: dict[str, list[float]] = {name: [] for name in running}
        peaks = dict.fromkeys(running, 0.0)
        for _ in range(options.rounds):
            for name, ranks in running.items():
                answers = ranks("embed")
                peaks[name] = max(peaks[name], answers[0].peak)
                seconds[name].append(cpu(answers))
    print(f"{len(texts):,} texts of {options.data}; vectors differ by {worst:.1e} at most\n")
    print("| | sentences a CPU s | ratio of time | peak MiB |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratio = statistics.median(x / ours for x, ours in zip(found, seconds["ours"], strict=True))
        print(f"| {name} | {len(texts) / statistics.median(found):,.0f} | {ratio:.2f} | {peaks[name]:,.0f} |")


if __name__ == "__main__":
    main()
