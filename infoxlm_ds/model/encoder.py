"""Encoders on packed sequences: transformers' own embeddings and layers, run on one flat row of tokens.

Legend: T tokens, S sequences, D width, K the universal layer, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infoxlm_ds.model.attention import Packing, pack
from infoxlm_ds.model.families import family_of, part
from infoxlm_ds.model.heads import SentenceHead


@dataclass(frozen=True)
class Packed:
    """S sequences one behind the other: ids [T], positions [T] from 0, the sequence of each token [T] and the lengths
    [S]."""

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
    positions = np.arange(len(ids)) - starts[sequence]

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))

    return Packed(tensor(ids), tensor(positions), tensor(sequence), tensor(lengths), pack(lengths))


class Body(nn.Module):
    """Embeddings and the first layers of an encoder, as a view on its weights."""

    def __init__(self, model: PreTrainedModel, layers: int | None = None) -> None:
        """`model`: the base model, without a head; `layers`: how many of its layers, None for all."""
        super().__init__()
        family = family_of(model.config)
        whole = part(model, family.layers)
        self.embeddings, self.layers = model.embeddings, whole[:layers]
        self.norm = part(model, family.norm) if len(self.layers) == len(whole) else None
        self.rotary = part(model, family.rotary)
        self._first_position = model.config.pad_token_id + 1 if family.counts_from_padding else 0

    def embed(self, batch: Packed) -> Tensor:
        """[T, D], `hidden_states[0]` of transformers."""
        positions = {} if self.rotary else {"position_ids": batch.positions[None] + self._first_position}
        out: Tensor = self.embeddings(input_ids=batch.ids[None], **positions)
        return out[0]

    def run(self, hidden: Tensor, positions: Tensor, packing: Packing, first: int, last: int) -> Tensor:
        """hidden [T, D], of tokens at these positions [T], through layers `first` to `last` - 1, each sequence for
        itself. Behind layer L comes the final norm of families that have one."""
        flat, angles = hidden[None], {}
        for layer in self.layers[first:last]:
            if self.rotary:
                kind = layer.attention_type
                if kind not in angles:
                    angles[kind] = self.rotary(flat, positions[None], kind)
                flat = layer(flat, None, position_embeddings=angles[kind], packing=packing)
            else:
                flat = layer(flat, None, packing=packing)
        if self.norm is not None and first < last == len(self.layers):
            flat = self.norm(flat)
        return flat[0]


class SentenceEncoder(nn.Module):
    """Embeddings, the first K layers and the sentence head: all that a representation for the contrast needs."""

    def __init__(self, body: Body, head: SentenceHead) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, batch: Packed) -> Tensor:
        """Representations [S, D] of the packed sequences."""
        body = self.body
        hidden = body.run(body.embed(batch), batch.positions, batch.packing, 0, len(body.layers))
        out: Tensor = self.head(hidden, batch.sequence, batch.lengths)
        return out


class InfoXLM(nn.Module):
    """An encoder with its masked LM head and a sentence head at the universal layer."""

    def __init__(self, lm: PreTrainedModel, head: SentenceHead, universal_layer: int) -> None:
        super().__init__()
        self.lm, self.head, self.universal_layer = lm, head, universal_layer

    @property
    def body(self) -> Body:
        return Body(self.lm.base_model)

    def forward(self, batch: Packed, trunk: Packing, n_trunk: int) -> tuple[Tensor, Tensor]:
        """One pass for all losses: the last `S - n_trunk` sequences are the contrast's and leave after the universal
        layer.

        `trunk` packs the first `n_trunk` sequences alone. Returns the last layer's states of the trunk's tokens and the
        representations [S - n_trunk, D].
        """
        body, middle = self.body, self.universal_layer
        hidden = body.run(body.embed(batch), batch.positions, batch.packing, 0, middle)
        tokens = len(trunk.scatter)
        leaving = self.head(hidden[tokens:], batch.sequence[tokens:] - n_trunk, batch.lengths[n_trunk:])
        if n_trunk == 0:
            return hidden[:0], leaving
        return body.run(hidden[:tokens], batch.positions[:tokens], trunk, middle, len(body.layers)), leaving

    def sentence_encoder(self) -> SentenceEncoder:
        """The part that the contrast trains, as a view on these weights."""
        return SentenceEncoder(Body(self.lm.base_model, self.universal_layer), self.head)
