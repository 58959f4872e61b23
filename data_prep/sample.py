"""The texts that a tokenizer is trained on: those with the smallest keyed hashes, weighted by language."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import zstandard

from data_prep.description import CorpusDescription
from data_prep.rows import Block, Row
from data_prep.texts import Texts

LEAST = 10_000  # texts that a block keeps of each language


class SampleTask(NamedTuple):
    """`most`: texts of each language that a block keeps."""

    description: CorpusDescription
    base: Path
    source: int
    block: Block
    most: int


def sample_block(task: SampleTask, out: Path) -> None:
    """Write how many texts of each language a block has, and those with the smallest hashes."""
    description, base, source, block, most = task
    key = description.seed.to_bytes(8, "little", signed=True)
    totals: Counter[str] = Counter()
    hashes: dict[str, dict[str, str]] = {}
    for item in Texts(description, base, description.sources[source], block):
        pairs = item.texts.items() if isinstance(item, Row) else ((item.language, text) for text in item.sentences)
        for language, text in pairs:
            totals[language] += 1
            of_language = hashes.setdefault(language, {})
            if text not in of_language:
                of_language[text] = hashlib.blake2b(text.encode(), digest_size=8, key=key).hexdigest()
            if len(of_language) > 4 * most:  # of a large block
                hashes[language] = {text: digest for digest, text in _smallest(of_language, most)}
    kept = {language: _smallest(of_language, most) for language, of_language in hashes.items()}
    out.write_bytes(zstandard.compress(json.dumps({"totals": totals, "texts": kept}).encode()))


def _smallest(hashes: dict[str, str], most: int) -> list[tuple[str, str]]:
    """The smallest hashes with their texts."""
    return heapq.nsmallest(most, ((digest, text) for text, digest in hashes.items()))


def merge_samples(samples: Sequence[Path], count: int, alpha: float) -> list[str]:
    """At most `count` different texts, sorted. If there are more, each language gets a share in proportion to p^alpha,
    p being its share of all texts."""
    totals: Counter[str] = Counter()
    found: dict[str, dict[str, str]] = {}
    for path in samples:
        tree = json.loads(zstandard.decompress(path.read_bytes()))
        totals.update(tree["totals"])
        for language, pairs in tree["texts"].items():
            found.setdefault(language, {}).update({text: digest for digest, text in pairs})
    quotas = _quotas({language: len(texts) for language, texts in found.items()}, totals, count, alpha)
    chosen: set[str] = set()
    for language, texts in found.items():
        chosen.update(heapq.nsmallest(quotas[language], texts, key=lambda text: (texts[text], text)))
    return sorted(chosen)


def _quotas(has: dict[str, int], totals: Counter[str], count: int, alpha: float) -> dict[str, int]:
    """How many texts of each language to take. What a small language cannot give, the others do."""
    quotas: dict[str, int] = {}
    left, open_ = count, dict(has)
    while open_:
        weights = {language: totals[language] ** alpha for language in open_}
        share = left / sum(weights.values())
        full = [language for language in open_ if open_[language] <= share * weights[language]]
        if not full:
            return quotas | {language: int(share * weight) for language, weight in weights.items()}
        for language in full:
            quotas[language] = open_.pop(language)
            left -= quotas[language]
    return quotas
