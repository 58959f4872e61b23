"""The heads of the encoder: the sentence head of the contrast, and the masked LM head on masked rows only.

Legend: S sequences, M masked rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from infoxlm_ds.config import Pooling
from infoxlm_ds.data.flat_batch import Layout
from infoxlm_ds.losses.masked_lm import masked_lm
from infoxlm_ds.model.embedding import TiedEmbedding
from infoxlm_ds.model.families import family_of


class SentenceHead(nn.Module):
    """Sentence representations [S, D] from the universal layer, the inner layer that the contrast reads: pool, project
    (InfoXLM, section 3.2), normalise. The recipe chooses each of the three."""

    def __init__(self, width: int, pooling: Pooling, projection: bool, normalized: bool) -> None:
        super().__init__()
        self.pooling, self.normalized = pooling, normalized
        self.projection = nn.Linear(width, width, bias=False) if projection else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=0.02)

    def reads(self, layout: Layout) -> Tensor | None:
        """The rows of a flat batch that `forward` takes. None: all of them."""
        return first_rows(layout) if self.pooling == "cls" else None

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        """The states of the rows that `reads` names, [S, D] or [T, D], to [S, D]."""
        return self.finish(hidden if self.pooling == "cls" else pool(hidden, layout, self.pooling))

    def finish(self, pooled: Tensor) -> Tensor:
        """What follows pooling, [S, D] to [S, D]."""
        if self.projection is not None:
            pooled = self.projection(pooled)
        return normalize(pooled.float(), dim=1) if self.normalized else pooled


def first_rows(layout: Layout) -> Tensor:
    """The row of each sequence's first token, [S] int64."""
    return layout.cu_seqlens[:-1].long()


def pool(hidden: Tensor, layout: Layout, pooling: Pooling) -> Tensor:
    """[T, D] to [S, D]: each sequence's first token (`cls`) or the mean over its tokens, special tokens included.

    The mean is computed in fp32, or in the type of `hidden` if that is wider.
    """
    if pooling == "cls":
        return hidden[first_rows(layout)]
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    sums = wide.new_zeros(len(layout.lengths), wide.shape[1]).index_add(0, layout.sequence, wide)
    return (sums / layout.lengths[:, None]).to(hidden.dtype)


def masked_lm_losses(lm: PreTrainedModel, rows: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The masked LM head on the masked rows [M, D] only. Returns their weighted cross-entropies [M] and, without
    gradient, their cross-entropies [M] in nats; see `masked_lm`. The vocabulary matrix may have more rows than
    the vocabulary; see `pad_vocabulary`."""
    decoder, words = lm.get_output_embeddings(), lm.get_input_embeddings()
    features = family_of(lm.config).features(lm, rows)
    collect = words.collect if isinstance(words, TiedEmbedding) and words.collects else None
    return masked_lm(features, decoder.weight, decoder.bias, labels, weights, lm.config.vocab_size, collect)
