"""The softmax of rows of logits as a Triton kernel: each row is read twice and written once.

The first pass keeps the largest logit so far and the sum of exponentials relative to it (Milakov and Gimelshein, 2018,
arXiv 1805.02867, algorithm 3); the second writes the softmax. Computation is in fp32. Without a GPU, it runs under
Triton's interpreter, which the tests use.

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits of a row that a program holds at once


def softmax_by_kernel(logits: Tensor, vocabulary: int) -> Tensor:
    """Turn logits [C, V], of which each row is contiguous, into their softmax in place, and return each row's
    log-sum-exp [C] in fp32. Columns from `vocabulary` on become 0."""
    log_sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        width, stride = logits.shape[1], logits.stride(0)
        _softmax[(len(logits),)](logits, log_sums, vocabulary, width, stride, BLOCK=BLOCK, num_warps=16)
    return log_sums


@triton.jit  # type: ignore[untyped-decorator]
def _softmax(logits, log_sums, vocabulary, width, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    first = logits + row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(first + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    tl.store(log_sums + row, top + tl.log(total))
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(first + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        tl.store(first + at, tl.exp(x - top) / total, mask=at < width)  # exact also where logits are large
