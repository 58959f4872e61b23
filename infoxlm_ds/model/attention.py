"""Attention on a flat batch. It is registered with transformers, so the layers of transformers run on
one row of tokens.

Legend: T tokens, S sequences, H heads, D width of a head, P tokens of all groups after padding.

A token may attend only to its own sequence. On CUDA in 16 bits, this is one varlen call. Elsewhere, sequences of
nearly equal length form groups, and each group is one dense call. This measured faster than a block-diagonal
mask or jagged tensors. A layout has dense groups or is for the varlen call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from infoxlm_ds.data.flat_batch import DenseGroups, Group, Layout

FLAT_ATTENTION = "infoxlm_flat"


def why_not_varlen(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why attention cannot be one varlen call on this device, in this dtype and with heads of this width. None if it
    can. Otherwise it runs in dense groups, and the layouts of batches need them."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if (major := torch.cuda.get_device_capability(device)[0]) < 8:
        return f"the GPU has compute capability {major}, and the kernel needs 8"
    if head_width % 8 or head_width > 256:
        return f"heads have a width of {head_width}, and the kernel takes multiples of 8 up to 256"
    return None


def flat_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """The attention interface of transformers, on one flat row: query, key, value [1, H, T, D] to [1, T, H, D].

    In `kwargs`: `layout` of the batch; `sliding_window` w, with which a token attends only to tokens less than w away;
    `dropout` of attention weights, which only dense groups have.
    """
    layout, scale, window = kwargs["layout"], kwargs.get("scaling"), kwargs.get("sliding_window")
    dropout = kwargs.get("dropout") or 0.0
    assert isinstance(layout, Layout) and attention_mask is None and isinstance(dropout, float)
    assert isinstance(scale, float | None) and isinstance(window, int | None)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    if layout.dense is None:
        assert not dropout
        return _varlen(q, k, v, layout, scale, window)[None], None
    return _in_groups(q, k, v, layout.dense, scale, window, dropout)[None], None


def _in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dense: DenseGroups,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    sizes = [group.stop - group.start for group in dense.groups]
    padded = (x.index_select(0, dense.gather).split(sizes) for x in (query, key, value))  # [P, H, D]
    parts = [
        _dense(group, *rows, scale=scale, window=window, dropout=dropout)
        for group, *rows in zip(dense.groups, *padded, strict=True)
    ]
    return torch.cat(parts).index_select(0, dense.scatter)


def _dense(
    group: Group, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, group.length)).transpose(1, 2)  # [count, H, length, D]

    mask = group.mask
    if window is not None and window < group.length:
        at = torch.arange(group.length, device=query.device)
        near = (at[:, None] - at).abs() < window
        mask = near if mask is None else mask & near
        # A padded query may see no real key. It gets its own key: its result is not read.
        mask = mask | torch.eye(group.length, dtype=torch.bool, device=query.device)
    q, k, v = (heads_first(x) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # needs CUDA to import fully

    cu, longest = layout.cu_seqlens, layout.longest
    near = (-1, -1) if window is None else (window - 1, window - 1)
    out = varlen_attn(query, key, value, cu, cu, longest, longest, scale=scale, window_size=near)
    assert isinstance(out, Tensor)
    return out


AttentionInterface.register(FLAT_ATTENTION, flat_attention)
