"""Retrieval of all languages of a file: accuracies, their means over groups of languages, and intervals.

Legend: n pairs, L languages, V views, S samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import Pooling
from infoxlm_ds.evaluation.bootstrap import Numbers, interval, resampled
from infoxlm_ds.evaluation.languages import SETS, base, family
from infoxlm_ds.evaluation.neighbours import Score, Vectors
from infoxlm_ds.evaluation.retrieval import (
    Accuracy,
    Embedder,
    Hits,
    RetrievalRow,
    embed_pivots,
    pair_hits,
    trigram_accuracy,
)
from infoxlm_ds.evaluation.text import Pairs
from infoxlm_ds.model.sentence_vector import View

MOST_TRIGRAMS = 100_000  # pairs; the time grows with their square
AVERAGED = ("forward", "backward", "trigram_forward", "trigram_backward", "chance")


@dataclass(frozen=True)
class MeanRow(Accuracy):
    """Mean accuracies of a `group` of languages of a file, by one view."""

    data: str
    group: str
    languages: int
    layer: int
    pooling: Pooling
    projected: bool
    score: Score


class Result(NamedTuple):
    """What one model reaches on one or more files."""

    rows: list[RetrievalRow]
    means: list[MeanRow]


class Measured(NamedTuple):
    """A language: its pairs, hits [V, n] forward and backward, and the accuracies of the trigram baseline."""

    pairs: Pairs
    forward: Hits
    backward: Hits
    trigrams: tuple[float, float]


def evaluate_all(embedder: Embedder, pairs: Mapping[str, Sequence[Pairs]], score: Score) -> Result:
    """`evaluate_retrieval` of several files, by their names."""
    result = Result([], [])
    for name, of_file in pairs.items():
        rows, means = evaluate_retrieval(embedder, name, of_file, score)
        result.rows.extend(rows)
        result.means.extend(means)
    return result


def evaluate_retrieval(embedder: Embedder, data: str, pairs: Sequence[Pairs], score: Score = "cosine") -> Result:
    """A row for every view and language of `pairs`, and one for every view and group, by rising layer. `data`: the
    name of the file that all pairs are of."""
    measured = list(_measured(embedder, pairs, score))
    both = [(one.forward.astype(np.float32) + one.backward) / np.float32(2) for one in measured]
    samples = resampled(both, [one.pairs.rows for one in measured])
    result = Result([], [])
    for number, view in enumerate(embedder.views):
        rows = [
            _row(one, number, view, embedder.projected, data, score, of_language[number])
            for one, of_language in zip(measured, samples, strict=True)
        ]
        result.rows.extend(rows)
        result.means.extend(
            _mean(name, [rows[i] for i in members], samples[members, number].mean(0)) for name, members in _groups(rows)
        )
    return result


def trigrams(pairs: Pairs) -> tuple[float, float]:
    """`trigram_accuracy` of the pairs. It takes longer than a small model, so the user's cache keeps what texts gave
    before, in small files by their hash. Of very many pairs it would take days: NaN."""
    if len(pairs.text) > MOST_TRIGRAMS:
        return float("nan"), float("nan")
    texts = json.dumps([pairs.pivot_text, pairs.text]).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "infoxlm", "trigrams")
    path = folder / f"{hashlib.sha256(texts).hexdigest()}.json"
    with suppress(OSError, ValueError):
        forward, backward = json.loads(path.read_text())
        return float(forward), float(backward)
    found = trigram_accuracy(pairs.pivot_text, pairs.text)
    with suppress(OSError):  # a home that cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(found))
    return found


def _measured(embedder: Embedder, pairs: Sequence[Pairs], score: Score) -> Iterator[Measured]:
    for of_language, pivot in zip(pairs, embed_pivots(embedder, pairs), strict=True):
        other: Vectors = embedder.embed(of_language.text, description=of_language.language)
        hits = [pair_hits(*vectors, of_language, score) for vectors in zip(pivot, other, strict=True)]
        forward, backward = (np.stack(direction) for direction in zip(*hits, strict=True))
        yield Measured(of_language, forward, backward, trigrams(of_language))


def _row(
    one: Measured, number: int, view: View, projected: bool, data: str, score: Score, samples: Numbers
) -> RetrievalRow:
    low, high = interval(samples)
    return RetrievalRow(
        data=data,
        lang=one.pairs.language,
        n=len(one.pairs.text),
        script=one.pairs.script,
        cross_script=one.pairs.cross_script,
        layer=view.layer,
        pooling=view.pooling,
        projected=projected,
        score=score,
        forward=float(one.forward[number].mean()),
        backward=float(one.backward[number].mean()),
        low=low,
        high=high,
        trigram_forward=one.trigrams[0],
        trigram_backward=one.trigrams[1],
        chance=1 / len(one.pairs.text),
    )


def _groups(rows: Sequence[RetrievalRow]) -> Iterator[tuple[str, list[int]]]:
    """Names of groups and the numbers of their languages: all, those in another script than the pivot's, the sets of
    papers if they are whole, scripts, families."""
    yield "all", list(range(len(rows)))
    if cross := [i for i, row in enumerate(rows) if row.cross_script]:
        yield "cross-script", cross
    bases = [base(row.lang) for row in rows]
    for name, codes in SETS.items():
        if set(codes.split()) <= set(bases):
            yield name, [i for i, code in enumerate(bases) if code in codes.split()]
    for kind, of_row in (("script", [row.script for row in rows]), ("family", [family(row.lang) for row in rows])):
        for name in sorted(set(of_row)):
            yield f"{kind} {name}", [i for i, other in enumerate(of_row) if other == name]


def _mean(group: str, rows: Sequence[RetrievalRow], samples: Numbers) -> MeanRow:
    low, high = interval(samples)
    of = rows[0]
    return MeanRow(
        data=of.data,
        group=group,
        languages=len(rows),
        layer=of.layer,
        pooling=of.pooling,
        projected=of.projected,
        score=of.score,
        low=low,
        high=high,
        **{name: fmean(getattr(row, name) for row in rows) for name in AVERAGED},
    )
