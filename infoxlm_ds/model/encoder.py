"""XLM-R on packed sequences: transformers' own embeddings and layers, run on one flat row of tokens.

Legend: T tokens, S sequences, D width, K the universal layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import XLMRobertaForMaskedLM

from infoxlm_ds.model.attention import Packing, pack
from infoxlm_ds.model.heads import SentenceHead

PADDING_ID = 1  # XLM-R counts positions from PADDING_ID + 1


@dataclass(frozen=True)
class Packed:
    """S sequences one behind the other: ids [T], positions [T], the sequence of each token [T] and the lengths [S]."""

    ids: Tensor
    positions: Tensor
    sequence: Tensor
    lengths: Tensor
    packing: Packing

    def to(self, device: torch.device) -> Packed:
        ids, positions, sequence, lengths = (
            x.to(device) for x in (self.ids, self.positions, self.sequence, self.lengths)
        )
        return Packed(ids, positions, sequence, lengths, self.packing.to(device))


def packed(ids: np.ndarray, lengths: np.ndarray) -> Packed:
    """Pack flat ids [T] of sequences with these lengths [S]."""
    starts = np.cumsum(lengths) - lengths
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(ids)) - starts[sequence] + PADDING_ID + 1

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))

    return Packed(tensor(ids), tensor(positions), tensor(sequence), tensor(lengths), pack(lengths))


def embed(embeddings: nn.Module, batch: Packed) -> Tensor:
    """Word, position and type embeddings with their LayerNorm, [T, D] (`hidden_states[0]` of transformers)."""
    out: Tensor = embeddings(input_ids=batch.ids[None], position_ids=batch.positions[None])
    return out[0]


def run_layers(layers: Iterable[nn.Module], hidden: Tensor, packing: Packing) -> Tensor:
    """hidden [T, D] through transformer layers, each sequence for itself."""
    flat = hidden[None]
    for layer in layers:
        flat = layer(flat, None, packing=packing)
    return flat[0]


class SentenceEncoder(nn.Module):
    """Embeddings, the first K layers and the sentence head: all that a representation for the contrast needs."""

    def __init__(self, embeddings: nn.Module, layers: nn.ModuleList, head: SentenceHead) -> None:
        super().__init__()
        self.embeddings, self.layers, self.head = embeddings, layers, head

    def forward(self, batch: Packed) -> Tensor:
        """Representations [S, D] of the packed sequences."""
        hidden = run_layers(self.layers, embed(self.embeddings, batch), batch.packing)
        out: Tensor = self.head(hidden, batch.sequence, batch.lengths)
        return out


class InfoXLM(nn.Module):
    """XLM-R with its masked LM head and a sentence head at the universal layer."""

    def __init__(self, lm: XLMRobertaForMaskedLM, head: SentenceHead, universal_layer: int) -> None:
        super().__init__()
        self.lm, self.head, self.universal_layer = lm, head, universal_layer

    def forward(self, batch: Packed, trunk: Packing, n_trunk: int) -> tuple[Tensor, Tensor]:
        """One pass for all losses: the last `S - n_trunk` sequences are the contrast's and leave after the universal
        layer.

        `trunk` packs the first `n_trunk` sequences alone. Returns the last layer's states of the trunk's tokens and the
        representations [S - n_trunk, D].
        """
        body = self.lm.roberta
        hidden = run_layers(body.encoder.layer[: self.universal_layer], embed(body.embeddings, batch), batch.packing)
        tokens = len(trunk.scatter)
        leaving = self.head(hidden[tokens:], batch.sequence[tokens:] - n_trunk, batch.lengths[n_trunk:])
        if n_trunk == 0:
            return hidden[:0], leaving
        return run_layers(body.encoder.layer[self.universal_layer :], hidden[:tokens], trunk), leaving

    def sentence_encoder(self) -> SentenceEncoder:
        """The part that the contrast trains, as a view on these weights."""
        body = self.lm.roberta
        return SentenceEncoder(body.embeddings, body.encoder.layer[: self.universal_layer], self.head)
