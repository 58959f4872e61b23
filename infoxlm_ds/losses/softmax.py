"""The softmax of rows of logits, in place, with their log-sum-exp. On CUDA it is one Triton kernel.

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_(logits: Tensor, vocabulary: int) -> Tensor:
    """Turn logits [C, V] into their softmax, in place. Returns the log-sum-exp of each row, [C], in fp32 or, for wider
    logits, in their type. Columns from `vocabulary` on are padding and become 0."""
    if logits.device.type == "cuda" and logits.dtype != torch.float64:
        from infoxlm_ds.losses.softmax_kernel import softmax_by_kernel  # Triton needs not be there without a GPU

        return softmax_by_kernel(logits, vocabulary)
    return softmax_by_passes(logits, vocabulary)


def softmax_by_passes(logits: Tensor, vocabulary: int) -> Tensor:
    """`softmax_` on any device, in several passes over memory."""
    logits[:, vocabulary:] = -math.inf
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(1, keepdim=True)
    total = wide.sub_(top).exp_().sum(1, keepdim=True)
    wide.div_(total)
    if wide is not logits:
        logits.copy_(wide)
    return (top + total.log())[:, 0]
