"""Cross-entropy of a linear vocabulary head. The logits of all rows never exist at once.

Legend: M masked rows, D width, V vocabulary, C rows of a chunk.

The forward pass computes the gradient: a chunk's logits [C, V] become its softmax and then its gradient in place. So
the memory peak is one chunk, and all losses of a micro-batch share one gradient buffer of the vocabulary matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024  # few rows would be slow: each chunk reads V x D; 1,024 rows of 250k logits are 0.95 GiB in fp32


def masked_lm(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, row_weights: Tensor, vocabulary: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropies of the rows [M], to be added up; and without gradient the cross-entropies [M] in nats.

    hidden [M, D]; weight [V, D]; bias [V]; labels [M] int64; row_weights [M]: a task's weight divided by its global
    count, so that the sum over lanes and ranks is the task's weighted mean. M may be 0. `vocabulary`: the number of
    pieces; the rows of `weight` after them are padding.

    Backward gives the gradient of the sum over all rows. The caller must sum all rows, in any parts. It may
    scale the sum. It must not weight rows differently.
    """
    weighted, rows = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, row_weights, vocabulary or len(weight)
    )
    return weighted, rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, row_weights: Tensor, vocabulary: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = torch.zeros(len(labels), dtype=wide, device=hidden.device)
        d_hidden, d_weight, d_bias = (
            torch.empty_like(hidden),
            torch.zeros_like(weight),
            torch.zeros_like(bias, dtype=wide),
        )
        # Gradients are stored divided by the largest weight: a weight of 1 / thousands of rows would make them vanish
        # in fp16 before the loss scale is applied.
        unit = row_weights.abs().max() if len(row_weights) else row_weights.new_ones(())
        unit = torch.where(unit > 0, unit, 1.0).to(wide)
        for start in range(0, len(labels), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = torch.addmm(bias, hidden[part], weight.t()).to(wide)  # [C, V]
            logits[:, vocabulary:] = -math.inf
            log_sum = torch.logsumexp(logits, dim=1)
            picked = labels[part, None]
            rows[part] = log_sum - logits.gather(1, picked)[:, 0]
            gradient = logits.sub_(log_sum[:, None]).exp_()
            gradient.scatter_add_(1, picked, gradient.new_full((1, 1), -1.0).expand_as(picked))
            gradient.mul_(row_weights[part, None] / unit)
            d_bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            d_hidden[part] = gradient @ weight
            d_weight.addmm_(gradient.t(), hidden[part])
        ctx.save_for_backward(d_hidden, d_weight, d_bias.to(bias.dtype), unit)
        ctx.mark_non_differentiable(rows)
        return rows * row_weights, rows

    @staticmethod
    def backward(ctx: Any, d_weighted: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias, unit = ctx.saved_tensors
        d_total = d_weighted[:1].sum() * unit  # the same for all rows; 0 where there is none
        return d_hidden * d_total, d_weight.mul_(d_total), d_bias * d_total, None, None, None
