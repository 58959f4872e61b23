"""Flat batches of items of nearly equal length.

Legend: T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds.data.flat_batch import FlatBatch, flat_batch
from infoxlm_ds.evaluation.finetune.items import Item

POOL = 64  # batches whose items are sorted by length together


@dataclass(frozen=True)
class Batch:
    """A flat batch and its labels, int64: [S] of pairs, [T] of words, [2 S] of answers."""

    flat: FlatBatch
    labels: Tensor


def packed(lengths: np.ndarray, tokens: int, generator: np.random.Generator | None) -> list[np.ndarray]:
    """The items of each batch, by number. A batch has at most so many tokens, or one item. Batches hold items of nearly
    equal length, and come in an order of chance; without a generator, in the order of lengths."""
    if generator is None:
        return _cut(np.argsort(lengths, kind="stable"), lengths, tokens)
    order = generator.permutation(len(lengths))
    size = max(1, int(POOL * tokens / lengths.mean()))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), size):
        pool = order[start : start + size]
        batches += _cut(pool[np.argsort(lengths[pool], kind="stable")], lengths, tokens)
    return [batches[i] for i in generator.permutation(len(batches))]


def _cut(order: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    starts, filled = [0], 0
    for place, length in enumerate(lengths[order].tolist()):
        if filled and filled + length > tokens:
            starts.append(place)
            filled = 0
        filled += length
    return np.split(order, starts[1:])


def collate(items: Sequence[Item]) -> Batch:
    """One flat batch of items. Attention runs in dense groups, because the varlen kernel has no dropout."""
    flat = flat_batch(np.concatenate([item.ids for item in items]), np.array([len(item.ids) for item in items]))
    return Batch(flat, torch.tensor([label for item in items for label in item.labels]))
