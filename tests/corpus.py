"""A small corpus of real text, prepared once in a test session, and recipes that train in seconds."""

from __future__ import annotations

import itertools
import json
import lzma
from pathlib import Path

import yaml

from infoxlm_ds.config import Recipe
from infoxlm_ds.reading import load_recipe

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "data_prep" / "embedded"
LANGUAGES = ["en", "de", "hu", "ru", "ko"]


def write_corpus(folder: Path, rows: int = 400, vocabulary: int = 800, negatives: bool = False) -> Path:
    """Prepare `rows` of the embedded corpus in `folder`/corpus, and return this path. `negatives`: two of three rows
    have the sentences of the next two as hard negatives."""
    from data_prep.build import build

    with lzma.open(EMBEDDED / "home_assistant.train.jsonl.xz", "rt", encoding="utf-8") as lines:
        trees = [json.loads(line) for line in itertools.islice(lines, rows)]
    for number, tree in enumerate(trees if negatives else []):
        if number % 3:
            wrong = [trees[(number + i) % rows]["text"] for i in (1, 2)]
            tree["negatives"] = {code: [text[code] for text in wrong if code in text] for code in ("en", "de")}
    lines_of_rows = (json.dumps(tree, ensure_ascii=False) + "\n" for tree in trees)
    (folder / "rows.jsonl").write_text("".join(lines_of_rows), encoding="utf-8")
    description = {
        "name": "small",
        "max_tokens": 48,
        "languages": LANGUAGES,
        "tokenizer": {"vocab_size": vocabulary},
        "sources": [{"name": "nway.rows", "kind": "nway", "format": "jsonl", "path": "rows.jsonl", "mono": True}],
    }
    (folder / "corpus.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")
    build(folder / "corpus.yaml", folder / "corpus")
    return folder / "corpus"


def small_recipe(corpus: Path, run: Path, *overrides: str) -> Recipe:
    """A recipe of four lanes (micro-batches of a step) and two layers on a small corpus. `overrides`: as
    on the command line."""
    tree = {
        "run": str(run),
        "corpus": str(corpus),
        "engine": str(ROOT / "ds_configs" / "zero1_fp32.json"),
        "model": {
            "layers": 2,
            "width": 32,
            "heads": 2,
            "feed_forward": 64,
            "positions": 128,
            "universal_layer": 1,
            "pooling": "mean",
            "normalize": True,
        },
        "contrast": {
            "temperature": 0.1,
            "queue": {"size": 40},
            "momentum": 0.9,
            "negatives": "both",
            "symmetric": True,
        },
        "batch": {"lanes": 4, "mmlm_tokens": 60, "tlm_tokens": 80, "xlco_pairs": 6},
        "sampling": {"window_packs": 1},
        # With a small eps, Adam would turn the rounding of gradients near zero into steps of full size.
        "optimizer": {"learning_rate": 1e-2, "eps": 1e-2, "steps": 6, "warmup": 1},
        "log": {"every": 1},
        "checkpoint": {"every": 2},
    }
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_recipe(path, list(overrides))
