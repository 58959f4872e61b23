"""Which pieces a masked LM has to guess: 15 % of them, 80/10/10 (BERT; XLM-R). A pure function of ids and a keyed
generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infoxlm_ds.config import Masking


@dataclass(frozen=True)
class Masked:
    """`ids` [T] after masking, the chosen `rows` [M] in ascending order and the pieces that stood there, `labels`
    [M]."""

    ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


def mask_pieces(
    ids: np.ndarray, vocabulary: int, special: np.ndarray, mask_id: int, how: Masking, generator: np.random.Generator
) -> Masked:
    """Mask ids [T]. Special tokens (ids in `special`) are never chosen, and never come in as a random piece."""
    regular = np.setdiff1d(np.arange(vocabulary), special)
    chosen = (generator.random(len(ids)) < how.probability) & ~np.isin(ids, special)
    (rows,) = np.nonzero(chosen)
    fate, pieces = generator.random(len(rows)), regular[generator.integers(len(regular), size=len(rows))]
    out = ids.copy()
    labels = ids[rows]
    out[rows] = np.where(fate < how.mask, mask_id, np.where(fate < how.mask + how.random, pieces, labels))
    return Masked(out, rows, labels)
