"""Encoders on flat batches: the embeddings and layers of transformers, run on one row of tokens.

The universal layer is the inner layer whose output the contrast reads.

Legend: T tokens, S sequences, D width, K the universal layer, L layers.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from infoxlm_ds.data.flat_batch import FlatBatch, Layout
from infoxlm_ds.model import attention  # noqa: F401  # registers flat attention with transformers
from infoxlm_ds.model.families import family_of, part
from infoxlm_ds.model.heads import SentenceHead


class Body(nn.Module):
    """Embeddings and the first layers of an encoder. It shares the encoder's weights."""

    def __init__(self, model: PreTrainedModel, layers: int | None = None) -> None:
        """`model`: the base model, without a head; `layers`: the number of its layers, None for all."""
        super().__init__()
        family = family_of(model.config)
        whole = part(model, family.layers)
        self.embeddings, self.layers = model.embeddings, whole[:layers]
        self.norm = part(model, family.norm) if len(self.layers) == len(whole) else None
        self.rotary = part(model, family.rotary)
        self._first_position = model.config.pad_token_id + 1 if family.counts_from_padding else 0

    def embed(self, batch: FlatBatch) -> Tensor:
        """Embeddings [T, D], the same as `hidden_states[0]` of transformers."""
        positions = {} if self.rotary else {"position_ids": batch.layout.positions[None] + self._first_position}
        out: Tensor = self.embeddings(input_ids=batch.ids[None], **positions)
        return out[0]

    def run(self, hidden: Tensor, layout: Layout, first: int, last: int) -> Tensor:
        """Run hidden [T, D] through layers `first` to `last` - 1, each sequence on its own. Families with a final norm
        apply it after layer L."""
        flat, angles = hidden[None], {}
        for layer in self.layers[first:last]:
            if self.rotary:
                kind = layer.attention_type
                if kind not in angles:
                    angles[kind] = self.rotary(flat, layout.positions[None], kind)
                flat = layer(flat, None, position_embeddings=angles[kind], layout=layout)
            else:
                flat = layer(flat, None, layout=layout)
        if self.norm is not None and first < last == len(self.layers):
            flat = self.norm(flat)
        return flat[0]


class SentenceEncoder(nn.Module):
    """Embeddings, the first K layers and the sentence head: all that a representation for the contrast needs."""

    def __init__(self, body: Body, head: SentenceHead) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, batch: FlatBatch) -> Tensor:
        """Representations [S, D] of the sequences."""
        body = self.body
        hidden = body.run(body.embed(batch), batch.layout, 0, len(body.layers))
        out: Tensor = self.head(hidden, batch.layout)
        return out


class InfoXLM(nn.Module):
    """An encoder with its masked LM head and a sentence head at the universal layer."""

    def __init__(self, lm: PreTrainedModel, head: SentenceHead, universal_layer: int) -> None:
        super().__init__()
        self.lm, self.head, self.universal_layer = lm, head, universal_layer

    @property
    def body(self) -> Body:
        return Body(self.lm.base_model)

    def forward(self, batch: FlatBatch, trunk: Layout, queries: Layout) -> tuple[Tensor, Tensor]:
        """One pass for all losses. The batch holds the trunk, which is the sequences of MMLM and TLM, and then the
        contrast's queries. The queries leave after the universal layer.

        Returns the last layer's states of the trunk's tokens, and the queries' representations.
        """
        body, middle = self.body, self.universal_layer
        hidden = body.run(body.embed(batch), batch.layout, 0, middle)
        states, leaving = hidden[: trunk.tokens], hidden[trunk.tokens :]
        representations = self.head(leaving, queries)
        if trunk.tokens:
            states = body.run(states, trunk, middle, len(body.layers))
        return states, representations

    def sentence_encoder(self) -> SentenceEncoder:
        """The part that the contrast trains. It shares these weights."""
        return SentenceEncoder(Body(self.lm.base_model, self.universal_layer), self.head)
