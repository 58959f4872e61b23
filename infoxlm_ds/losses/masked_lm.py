"""Cross-entropy of a linear vocabulary head. The logits of all rows never exist at once.

Legend: M masked rows, D width, V vocabulary, C rows of a chunk.

The forward pass computes the gradient: a chunk's logits [C, V] become its softmax and then its gradient in place. So
the memory peak is one chunk, and all losses of a micro-batch share one gradient buffer of the vocabulary matrix. On a
GPU, 16-bit logits move 14 bytes each: written by one product, read twice and written once by the softmax, and read by
the two products and the sum that give the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infoxlm_ds.losses.softmax import softmax_

CHUNK_ROWS = 4096  # few rows would be slow: each chunk reads V x D
CHUNK_BYTES = 2**31  # of logits; at least one row


def rows_of_chunk(vocabulary: int, element: int) -> int:
    """Rows whose logits, of `element` bytes each, exist at once."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // (vocabulary * element)))


def masked_lm(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    vocabulary: int | None = None,
    collect: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropies of the rows [M], to be added up; and without gradient the cross-entropies [M] in nats.

    hidden [M, D]; weight [V, D]; bias [V]; labels [M] int64; row_weights [M]: a task's weight divided by its global
    count, so that the sum over lanes and ranks is the task's weighted mean. M may be 0. `vocabulary`: the number of
    pieces; the rows of `weight` after them are padding. `collect`: takes the gradient of `weight` in backward, which
    then gets none from here.

    Backward gives the gradient of the sum over all rows. The caller must sum all rows, in any parts. It may
    scale the sum. It must not weight rows differently.
    """
    weighted, rows = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, row_weights, vocabulary or len(weight), collect
    )
    return weighted, rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        row_weights: Tensor,
        vocabulary: int,
        collect: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        unit = _unit(row_weights, hidden.dtype).to(wide)
        scales = (row_weights / unit).to(wide)
        rows, d_hidden = torch.zeros(len(labels), dtype=wide, device=hidden.device), torch.empty_like(hidden)
        d_weight, d_bias = None, torch.zeros_like(bias, dtype=wide)
        size = rows_of_chunk(len(weight), weight.element_size())
        for part in (slice(start, start + size) for start in range(0, len(labels), size)):
            states, picked, scale = hidden[part], labels[part, None], scales[part]
            logits = torch.addmm(bias, states, weight.t())  # [C, V]
            of_label = logits.gather(1, picked).to(wide)
            log_sum = softmax_(logits, vocabulary)[:, None]
            rows[part] = (log_sum - of_label)[:, 0]
            # Less 1 at the label. Computed from the logit, because a softmax near 1 is rounded to 16 bits.
            logits.scatter_(1, picked, torch.expm1(of_label - log_sum).to(logits.dtype))
            d_hidden[part] = (logits @ weight) * scale[:, None]
            d_bias += logits.t() @ scale.to(logits.dtype)
            product = logits.t() @ (states * scale[:, None]).to(states.dtype)
            d_weight = product if d_weight is None else d_weight.to(wide).add_(product)
            del logits, product  # before the next chunk's are made
        d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        # Not `save_for_backward`: autograd would hold d_weight, and copy it to make it the parameter's gradient.
        ctx.collect, ctx.gradients = collect, (d_hidden, d_weight, d_bias.to(bias.dtype), unit)
        ctx.mark_non_differentiable(rows)
        return rows * row_weights, rows

    @staticmethod
    def backward(ctx: Any, d_weighted: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias, unit = ctx.gradients
        del ctx.gradients
        d_total = d_weighted[:1].sum() * unit  # the same for all rows; 0 where there is none
        if d_total.device.type != "cpu" or d_total != 1:  # a CPU reads it at no cost, and may save a pass over V x D
            d_weight.mul_(d_total)
        if ctx.collect is not None:
            ctx.collect(d_weight)
            d_weight = None
        return d_hidden * d_total, d_weight, d_bias * d_total, None, None, None, None


def _unit(row_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What gradients in 16 bits are divided by until backward multiplies them: the largest weight, [] above 0. A weight
    of 1 / thousands of rows would make them vanish in fp16 before the loss scale is applied."""
    if dtype not in (torch.float16, torch.bfloat16) or not len(row_weights):
        return row_weights.new_ones(())
    largest = row_weights.abs().max()
    return torch.where(largest > 0, largest, 1.0)
