"""Prepares tiny corpora from a few rows, and reads what they store."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.build import build
from infoxlm_ds.data.corpus import Corpus
from tests.corpus import LANGUAGES


def describe(folder: Path, tokenizer: dict[str, Any], sources: list[dict[str, Any]], **rest: Any) -> Path:
    tree = {"name": "tiny", "tokenizer": tokenizer, "sources": sources} | rest
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    lines = (json.dumps({"key": str(i), "text": row}, ensure_ascii=False) + "\n" for i, row in enumerate(rows))
    path.write_text("".join(lines), encoding="utf-8")


def prepare(folder: Path, tokenizer: Path, sources: list[dict[str, Any]], **rest: Any) -> Corpus:
    """The corpus of `sources`, with the tokenizer of another corpus."""
    folder.mkdir(exist_ok=True)
    build(describe(folder, {"path": str(tokenizer / "tokenizer")}, sources, **rest), folder / "corpus")
    return Corpus(folder / "corpus")


def stored(corpus: Corpus, name: str) -> list[dict[str, tuple[list[int], int]]]:
    """All rows of a source: {language: (ids, text id)}."""
    number = next(i for i, source in enumerate(corpus.sources) if source.name == name)
    source = corpus.sources[number]
    rows = []
    for p in range(source.packs):
        pack = corpus.pack(number, p)
        ends = np.cumsum(pack.lengths.T.ravel().astype(int)).reshape(pack.lengths.T.shape).T
        for i in range(pack.lengths.shape[1]):
            sides = [s for s in range(len(source.languages)) if pack.lengths[s, i]]
            parts = {s: pack.ids[ends[s, i] - int(pack.lengths[s, i]) : ends[s, i]].tolist() for s in sides}
            rows.append({source.languages[s]: (parts[s], int(pack.text_ids[s, i])) for s in sides})
    return rows


def bag(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(row, sort_keys=True) for row in rows)


def read_rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [{code: text for code, text in json.loads(line)["text"].items() if code in LANGUAGES} for line in lines]
