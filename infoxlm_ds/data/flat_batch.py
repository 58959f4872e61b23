"""A flat batch: sequences concatenated in one row of tokens, and their layout, which attention reads.

Legend: T tokens, S sequences, P tokens of all groups after padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PADDING_FACTOR = 1.15  # the longest sequence of a group is at most so many times its shortest


@dataclass(frozen=True)
class Group:
    """Sequences that share one dense attention call: rows `start:stop` of the padded order, as [count, length]."""

    start: int
    stop: int
    length: int
    mask: Tensor | None  # [count, 1, 1, length] bool, True for real tokens; None if all lengths are equal


@dataclass(frozen=True)
class DenseGroups:
    """Groups of sequences of nearly equal length. `gather` [P] puts tokens into the padded order of the groups, and
    `scatter` [T] puts them back."""

    gather: Tensor
    scatter: Tensor
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Layout:
    """How T tokens form S sequences.

    `positions` [T] int64: each token's position in its sequence. `sequence` [T] int64: the number of each
    token's sequence. `lengths` [S] int64. `cu_seqlens` [S + 1] int32: where sequences begin and end.
    `longest`: the longest length. `dense`: None if attention does not run in dense groups; then the varlen
    kernel reads `cu_seqlens` and `longest`.
    """

    positions: Tensor
    sequence: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    longest: int
    dense: DenseGroups | None

    @property
    def tokens(self) -> int:
        """The number of tokens, T."""
        return len(self.positions)


@dataclass(frozen=True)
class FlatBatch:
    """Token ids [T] int64 and their layout."""

    ids: Tensor
    layout: Layout


def flat_batch(ids: np.ndarray, lengths: np.ndarray, dense: bool = True) -> FlatBatch:
    """The flat batch of sequences. `ids` [T]: their token ids, concatenated; `lengths` [S]: each at least 1."""
    return FlatBatch(_tensor(ids), make_layout(lengths, dense))


def make_layout(lengths: np.ndarray, dense: bool = True) -> Layout:
    """The layout of sequences with these lengths [S]."""
    ends = np.cumsum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(sequence)) - (ends - lengths)[sequence]
    cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    groups = _dense_groups(lengths) if dense else None
    longest = int(lengths.max(initial=0))
    return Layout(_tensor(positions), _tensor(sequence), _tensor(lengths), cu_seqlens, longest, groups)


def _dense_groups(lengths: np.ndarray) -> DenseGroups:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    gather, valid, groups = [np.zeros(0, np.int64)], [np.zeros(0, bool)], []
    first = filled = 0
    while first < len(order):
        last = int(np.searchsorted(ordered, ordered[first] * PADDING_FACTOR, side="right"))
        members, length = order[first:last], int(ordered[last - 1])
        column = np.arange(length)[None, :]
        real = column < lengths[members, None]
        # Padding repeats the sequence's last token. Any real token would do, because the mask hides it.
        gather.append((starts[members, None] + np.minimum(column, lengths[members, None] - 1)).ravel())
        valid.append(real.ravel())
        mask = None if real.all() else torch.from_numpy(real)[:, None, None, :]
        groups.append(Group(filled, filled + real.size, length, mask))
        first, filled = last, filled + real.size
    index, (real_rows,) = np.concatenate(gather), np.nonzero(np.concatenate(valid))
    scatter = np.empty(starts[-1], np.int64)
    scatter[index[real_rows]] = real_rows
    return DenseGroups(_tensor(index), _tensor(scatter), tuple(groups))


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))
