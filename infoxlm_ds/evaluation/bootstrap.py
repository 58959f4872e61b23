"""How far an accuracy would move with other rows of the same kind: the bootstrap's percentile interval (Efron, 1979).

Rows of a file are drawn with replacement, for all languages at once, because the languages of an n-way row share its
meaning. A mean over languages has its own interval from the same draws.

Legend: R rows of the file, n rows of a language, V views, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float32]
SAMPLES = 1000
COUNTS = 20_000_000  # in memory at once: rows times samples
LIMITS = (2.5, 97.5)  # percentiles, of a 95 % interval


def resampled(hits: Sequence[Numbers], rows: Sequence[Sequence[int]]) -> Numbers:
    """Accuracies [languages, V, S] over samples of rows. For each language, `hits` [V, n], between 0 and 1, and the
    numbers of its `rows` [n]. A sample that has no row of a language leaves its accuracy as it is."""
    chance = np.random.default_rng(0)
    total = 1 + max(max(numbers) for numbers in rows)
    parts, at_once = [], max(1, COUNTS // total)
    for first in range(0, SAMPLES, at_once):
        drawn = chance.multinomial(total, np.full(total, 1 / total), min(at_once, SAMPLES - first)).astype(np.float32)
        accuracies = []
        for of_language, numbers in zip(hits, rows, strict=True):
            counts = drawn[:, numbers].T  # [n, S]
            seen = counts.sum(0)
            found = of_language @ counts / np.maximum(seen, 1)
            accuracies.append(np.where(seen > 0, found, of_language.mean(1, keepdims=True)))
        parts.append(np.stack(accuracies))
    return np.concatenate(parts, axis=2, dtype=np.float32)


def interval(samples: Numbers) -> tuple[float, float]:
    """The 95 % interval of an accuracy whose samples are [S]."""
    low, high = np.percentile(samples, LIMITS)
    return float(low), float(high)
