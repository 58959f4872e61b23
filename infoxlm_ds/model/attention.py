"""Attention over packed sequences, registered with transformers so that its own layers run on a flat batch.

Legend: T tokens, S sequences, H heads, D width of a head, P tokens of all groups after padding.

A flat batch holds S sequences one behind the other; a token may attend to its own sequence only. On CUDA in 16 bits
that is one varlen call. Elsewhere sequences of nearly equal length are put into groups and each group is one dense
call, which measured faster than a block-diagonal mask or jagged tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "infoxlm_packed"
PADDING_SHARE = 1.15  # a group's longest sequence over its shortest, at most


@dataclass(frozen=True)
class Group:
    """Sequences that share one dense call: rows `start:stop` of the padded layout, as [count, length]."""

    start: int
    stop: int
    length: int
    mask: Tensor | None  # [count, 1, 1, length] bool, None where all lengths are equal


@dataclass(frozen=True)
class Packing:
    """How the T tokens of a flat batch fall into sequences.

    `cu_seqlens` [S + 1] int32 serves the varlen kernel; `gather` [P] takes tokens into the padded layout of the groups
    and
    `scatter` [T] brings them back.
    """

    cu_seqlens: Tensor
    longest: int
    gather: Tensor
    scatter: Tensor
    groups: tuple[Group, ...]

    def to(self, device: torch.device) -> Packing:
        groups = tuple(
            Group(g.start, g.stop, g.length, g.mask if g.mask is None else g.mask.to(device)) for g in self.groups
        )
        return Packing(
            self.cu_seqlens.to(device), self.longest, self.gather.to(device), self.scatter.to(device), groups
        )


def pack(lengths: np.ndarray) -> Packing:
    """The packing of sequences with these lengths ([S] integers, each at least 1)."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    gather, valid, groups = [np.zeros(0, np.int64)], [np.zeros(0, bool)], []
    first = filled = 0
    while first < len(order):
        last = int(np.searchsorted(ordered, ordered[first] * PADDING_SHARE, side="right"))
        members, length = order[first:last], int(ordered[last - 1])
        column = np.arange(length)[None, :]
        real = column < lengths[members, None]
        # A padded column repeats the sequence's last token: any real row does, the mask hides it.
        gather.append((starts[members, None] + np.minimum(column, lengths[members, None] - 1)).ravel())
        valid.append(real.ravel())
        mask = None if real.all() else torch.from_numpy(real)[:, None, None, :]
        groups.append(Group(filled, filled + real.size, length, mask))
        first, filled = last, filled + real.size
    index, (real_rows,) = np.concatenate(gather), np.nonzero(np.concatenate(valid))
    scatter = np.empty(starts[-1], np.int64)
    scatter[index[real_rows]] = real_rows
    longest = int(lengths.max(initial=0))
    cu_seqlens = torch.from_numpy(starts.astype(np.int32))
    return Packing(cu_seqlens, longest, torch.from_numpy(index), torch.from_numpy(scatter), tuple(groups))


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """transformers' attention interface on one flat row: query, key, value [1, H, T, D] to [1, T, H, D].

    `sliding_window` w among the kwargs: a token attends to those less than w away.
    """
    packing, scale, window = kwargs["packing"], kwargs.get("scaling"), kwargs.get("sliding_window")
    assert isinstance(packing, Packing) and attention_mask is None and not kwargs.get("dropout")
    assert isinstance(scale, float | None) and isinstance(window, int | None)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q, k, v, packing, scale, window)[None], None
    padded = [x.index_select(0, packing.gather) for x in (q, k, v)]  # [P, H, D]
    parts = [
        _dense(group, *(x[group.start : group.stop] for x in padded), scale=scale, window=window)
        for group in packing.groups
    ]
    return torch.cat(parts).index_select(0, packing.scatter)[None], None


def _dense(
    group: Group, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None
) -> Tensor:
    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, group.length)).transpose(1, 2)  # [count, H, length, D]

    mask = group.mask
    if window is not None and window < group.length:
        at = torch.arange(group.length, device=query.device)
        near = (at[:, None] - at).abs() < window
        mask = near if mask is None else mask & near
        # Padded queries may see no real key; any will do, nobody reads them.
        mask = mask | torch.eye(group.length, dtype=torch.bool, device=query.device)
    q, k, v = (heads_first(x) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(0, 1)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # needs CUDA to import fully

    cu, longest = packing.cu_seqlens, packing.longest
    near = (-1, -1) if window is None else (window - 1, window - 1)
    out = varlen_attn(query, key, value, cu, cu, longest, longest, scale=scale, window_size=near)
    assert isinstance(out, Tensor)
    return out


AttentionInterface.register(PACKED, packed_attention)
