"""Chooses the pieces that a masked LM has to predict: 15 % of them, 80/10/10 (BERT; XLM-R). A pure function of ids
and a keyed generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infoxlm_ds.config import Masking


@dataclass(frozen=True)
class Masked:
    """`ids` [T]: ids after masking. `rows` [M]: the chosen positions, in ascending order. `labels` [M]: the
    pieces that stood there."""

    ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


def mask_pieces(
    ids: np.ndarray, regular: np.ndarray, mask_id: int, how: Masking, step: int, generator: np.random.Generator
) -> Masked:
    """Mask ids [T] of a step. `regular` [V] bool: True for all ids except the special tokens. A special token is never
    chosen, and it is never the random piece that replaces another one."""
    (rows,) = np.nonzero((generator.random(len(ids)) < how.probability_at(step)) & regular[ids])
    fate, drawn = generator.random(len(rows)), generator.integers(np.count_nonzero(regular), size=len(rows))
    out, labels = ids.copy(), ids[rows]
    pieces = np.flatnonzero(regular)[drawn]
    out[rows] = np.where(fate < how.mask, mask_id, np.where(fate < how.mask + how.random, pieces, labels))
    return Masked(out, rows, labels)
