"""The cases of the benchmarks of training: a recipe, its corpus, batches and a full queue.

Text is the corpus that comes with the project, which has 16,000 pieces. For a larger vocabulary, a fixed random map
spreads these pieces over it: what a step costs depends on the size of the matrices and on how many rows it touches. The
kind `blocks-254` joins all texts of a language into one long text, which preparation cuts into blocks of 254 pieces;
with their two special pieces they have 256 tokens.
"""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infoxlm_ds.config import Place, Recipe
from infoxlm_ds.data.batch import N_TEXTS, BatchBuilder, JointBatch
from infoxlm_ds.data.corpus import PACKS_KEPT, Corpus
from infoxlm_ds.data.packs import Pack
from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.pretrained import build_model
from infoxlm_ds.reading import check

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "benchmarks"
EMBEDDED = ROOT / "data_prep" / "embedded"
LANGUAGES = ("de", "en", "es", "et", "fr", "hu", "ru", "vi")  # of blocks
PIECES = 16_000  # of the embedded corpus
PAPER = {"keys": "momentum", "negatives": "queue", "symmetric": False, "mixup": "paper"}
STRONG = {"keys": "gradient", "negatives": "in_batch", "symmetric": True, "mixup": "off"}


@dataclass(frozen=True)
class Case:
    """Sizes of a step. `tokens`: of MMLM and TLM in each lane."""

    text: str = "short"
    vocabulary: int = PIECES
    tokens: tuple[int, int] = (512, 512)
    pairs: int = 16
    lanes: int = 1
    layers: int = 6
    width: int = 384
    heads: int = 6
    universal_layer: int = 4
    queue: int = 4096
    stage: int = 1  # of ZeRO
    contrast: dict[str, Any] = field(default_factory=lambda: dict(PAPER))

    def recipe(self) -> Recipe:
        strong = self.contrast["keys"] == "gradient"
        tree = {
            "run": RUNS / "run",
            "corpus": corpus_of(self.text),
            "engine": ROOT / "ds_configs" / f"zero{self.stage}_fp32.json",
            "model": {
                "layers": self.layers,
                "width": self.width,
                "heads": self.heads,
                "feed_forward": 4 * self.width,
                "positions": 1030,
                "universal_layer": self.universal_layer,
                "pooling": "mean" if strong else "cls",
                "projection": not strong,
                "normalize": strong,
            },
            "contrast": self.contrast | {"temperature": 0.05 if strong else 0.25, "queue": {"size": self.queue}},
            "batch": {
                "lanes": self.lanes,
                "mmlm_tokens": self.tokens[0],
                "tlm_tokens": self.tokens[1],
                "xlco_pairs": self.pairs,
            },
            "optimizer": {"learning_rate": 1e-4, "steps": 10**9, "warmup": 0},
            "log": {"every": 10**9, "geometry": 10**9},
        }
        return check(Recipe, tree, "benchmark")


@dataclass(frozen=True)
class Work:
    """What all implementations of a case get. `batches`: the lanes of each step; steps take them in turn."""

    case: Case
    recipe: Recipe
    corpus: Corpus
    model: InfoXLM
    batches: list[list[JointBatch]]
    queue: Keys | None


def work(case: Case, steps: int) -> Work:
    recipe = case.recipe()
    corpus = SpreadCorpus(recipe.corpus, case.vocabulary)
    tokenizer = corpus.manifest.tokenizer
    lanes = list(range(case.lanes))
    builder = BatchBuilder(recipe, corpus, lanes)
    batches = [[builder.build(lane, step) for lane in lanes] for step in range(steps)]
    model = build_model(recipe.model, tokenizer.vocab_size, recipe.seed, tokenizer.special_ids)
    return Work(case, recipe, corpus, model, batches, _queue(case, model, batches))


def real_tokens(prepared: Work) -> float:
    """Mean number of a step's tokens, keys included."""
    lanes = [lane for lanes in prepared.batches for lane in lanes]
    tokens = sum(len(lane.tokens.ids) + (len(lane.keys.ids) if lane.keys else 0) for lane in lanes)
    return tokens / len(prepared.batches)


@torch.no_grad()
def _queue(case: Case, model: InfoXLM, batches: list[list[JointBatch]]) -> Keys | None:
    """Keys of the batches' own texts with noise, so that a loss is neither 0 nor huge. They share no text with them."""
    encoder, g = model.sentence_encoder(), torch.Generator().manual_seed(0)
    found = [encoder(lane.keys) for lanes in batches[:2] for lane in lanes if lane.keys is not None]
    if not found:
        return None
    keys = torch.cat(found)
    chosen = torch.randint(len(keys), (case.queue,), generator=g)
    vectors = torch.randn(case.queue, keys.shape[1], generator=g).mul_(0.1 * keys.std()).add_(keys[chosen])
    ids = torch.randint(2**60, (case.queue, N_TEXTS[case.contrast["mixup"]]), generator=g)
    return Keys(vectors, ids)


class SpreadCorpus(Corpus):
    """A corpus whose pieces are spread over a vocabulary of another size. Special pieces keep their numbers."""

    def __init__(self, path: Place, vocabulary: int) -> None:
        super().__init__(path, look_at_files=False)
        tokenizer, read = self.manifest.tokenizer, self.pack
        table = np.arange(tokenizer.vocab_size, dtype=np.uint32)
        if vocabulary > len(table):
            special = list(tokenizer.special_ids.values())
            free = np.setdiff1d(np.arange(vocabulary, dtype=np.uint32), table[special])
            table = np.random.default_rng(0).permutation(free)[: len(table)]
            table[special] = special
        larger = tokenizer.model_copy(update={"vocab_size": max(vocabulary, len(table))})
        self.manifest = self.manifest.model_copy(update={"tokenizer": larger})

        def spread(source: int, number: int) -> Pack:
            pack = read(source, number)
            return replace(pack, ids=table[pack.ids])

        self.pack = lru_cache(PACKS_KEPT)(spread)


def corpus_of(text: str) -> Path:
    """The corpus with this kind of text. It is prepared if it is not there yet."""
    folder = RUNS / f"corpus-{text}"
    if (folder / "manifest.json").is_file():
        return folder
    description = EMBEDDED / "corpus.yaml" if text == "short" else _describe_blocks(int(text.removeprefix("blocks-")))
    command: list[str | Path] = [
        sys.executable,
        "-c",
        "from infoxlm_ds.cli import main; main()",
        "prep",
        "build",
        description,
        folder,
    ]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return folder


def _describe_blocks(pieces: int) -> Path:
    """Write the description of a corpus of full blocks, and its text files."""
    source = EMBEDDED / "home_assistant.train.jsonl.xz"
    texts: dict[str, list[str]] = defaultdict(list)
    with lzma.open(source, "rt", encoding="utf-8") as rows:
        for row in rows:
            for language, text in json.loads(row)["text"].items():
                texts[language].append(text)
    folder = RUNS / f"text-{pieces}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [{"name": "nway.home_assistant", "kind": "nway", "format": "jsonl", "path": str(source)}]
    for language in LANGUAGES:
        path = folder / f"{language}.txt"
        path.write_text(" ".join(" ".join(text.split()) for text in texts[language]) + "\n", encoding="utf-8")
        mono: dict[str, Any] = {"name": f"mono.{language}-files", "kind": "mono", "format": "text"}
        sources.append(mono | {"path": str(path), "languages": [language]})
    description = {"name": "blocks", "max_tokens": pieces, "tokenizer": {"path": str(corpus_of("short") / "tokenizer")}}
    written = folder / "corpus.yaml"
    written.write_text(json.dumps(description | {"sources": sources}), encoding="utf-8")  # JSON is YAML
    return written
