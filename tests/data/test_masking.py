"""Masking splits the chosen pieces 80/10/10, chooses no special token, and is a pure function of its key."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from infoxlm_ds.config import Masking
from infoxlm_ds.data.masking import Masked, mask_pieces

SPECIAL, MASK_ID = np.array([0, 1, 2, 3, 99]), 99
REGULAR = ~np.isin(np.arange(100), SPECIAL)


def _mask(ids: np.ndarray, key: int, how: Masking | None = None) -> Masked:
    return mask_pieces(ids, REGULAR, MASK_ID, how or Masking(), 0, np.random.Generator(np.random.Philox(key)))


@given(st.lists(st.integers(0, 99), max_size=200), st.integers(0, 2**64))
def test_special_tokens_are_never_masked_and_labels_are_what_stood_there(ids: list[int], key: int) -> None:
    before = np.array(ids, dtype=np.int64)
    masked = _mask(before, key, Masking(probability=0.5))
    assert not np.isin(before[masked.rows], SPECIAL).any()
    assert (masked.labels == before[masked.rows]).all()
    untouched = np.setdiff1d(np.arange(len(before)), masked.rows)
    assert (masked.ids[untouched] == before[untouched]).all()
    changed = masked.ids[masked.rows]
    assert not np.isin(changed[changed != MASK_ID], SPECIAL).any()


def test_shares_are_15_percent_and_80_10_10() -> None:
    ids = np.full(200_000, 50, np.int64)
    masked = _mask(ids, 1)
    n = len(masked.rows)
    after = masked.ids[masked.rows]
    kept = 0.1 + 0.1 / 95  # a random piece may equal the old one
    for observed, expected, trials in [
        (n, 0.15, len(ids)),
        (int((after == MASK_ID).sum()), 0.8, n),
        (int((after == 50).sum()), kept, n),
    ]:
        assert abs(observed / trials - expected) < 5 * np.sqrt(expected * (1 - expected) / trials)


def test_the_key_alone_decides() -> None:
    ids = np.random.default_rng(0).integers(4, 99, size=1000)
    assert (_mask(ids, 7).ids == _mask(ids, 7).ids).all()
    assert (_mask(ids, 7).ids != _mask(ids, 8).ids).any()
