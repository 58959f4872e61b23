"""Word embeddings that share their matrix with the masked LM head.

Legend: V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class TiedEmbedding(nn.Embedding):
    """Embeddings whose matrix [V, D] is also that of the masked LM head. The matrix' two gradients share one buffer:
    backward reaches the head first, which leaves its gradient here, and then the embeddings, which add their rows.

    So a backward pass of the head must reach the embeddings too. In 16 bits, autograd adds the two gradients as usual:
    there, the rows of frequent words must be added up in fp32 first.
    """

    _of_head: Tensor | None = None

    @staticmethod
    def of(words: nn.Embedding) -> TiedEmbedding:
        """The same embeddings, with the same weight."""
        tied = TiedEmbedding(words.num_embeddings, words.embedding_dim, words.padding_idx, device="meta")
        tied.weight = words.weight
        return tied

    @property
    def collects(self) -> bool:
        """Whether the head leaves its gradient here."""
        return self.weight.dtype == torch.float32

    def collect(self, gradient: Tensor) -> None:
        """The head's gradient of the matrix. It becomes the buffer."""
        assert self._of_head is None, "the last backward pass of the head did not reach the embeddings"
        self._of_head = gradient

    def take(self) -> Tensor | None:
        """What `collect` was given, once; None if there is nothing."""
        gradient, self._of_head = self._of_head, None
        return gradient

    def forward(self, input: Tensor) -> Tensor:
        if not self.collects:
            return super().forward(input)
        out: Tensor = _Lookup.apply(self.weight, input, self)  # type: ignore[no-untyped-call]
        return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, words: TiedEmbedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.words, ctx.shape = words, weight.shape
        return embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        gradient = ctx.words.take()
        if gradient is None:
            gradient = d_out.new_zeros(ctx.shape)
        return gradient.index_add_(0, ids.flatten(), d_out.flatten(0, -2)), None, None
