"""Encoders on flat batches: the embeddings and layers of transformers, run on one row of tokens.

The universal layer is the inner layer whose output the contrast reads.

Legend: T tokens, S sequences, M masked rows, R rows that are read, D width, K the universal layer, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from infoxlm_ds.data.flat_batch import FlatBatch, Layout
from infoxlm_ds.model import attention  # noqa: F401  # registers flat attention with transformers
from infoxlm_ds.model.families import compile_finish, family_of, part
from infoxlm_ds.model.heads import SentenceHead, pool


class Body(nn.Module):
    """Embeddings and the first layers of an encoder. It shares the encoder's weights."""

    def __init__(self, model: PreTrainedModel, layers: int | None = None, compiled: bool = False) -> None:
        """`model`: the base model, without a head; `layers`: the number of its layers, None for all; `compiled`: run
        what follows attention in a layer by torch.compile."""
        super().__init__()
        self._family = family = family_of(model.config)
        self._finish = compile_finish(family) if compiled else family.finish
        whole = part(model, family.layers)
        self.embeddings, self.layers = model.embeddings, whole[:layers]
        self.norm = part(model, family.norm) if len(self.layers) == len(whole) else None
        self.rotary = part(model, family.rotary)
        self.head_width: int = model.config.hidden_size // model.config.num_attention_heads
        self._first_position = model.config.pad_token_id + 1 if family.counts_from_padding else 0

    def embed(self, batch: FlatBatch) -> Tensor:
        """Embeddings [T, D], the same as `hidden_states[0]` of transformers."""
        positions = {} if self.rotary else {"position_ids": batch.layout.positions[None] + self._first_position}
        out: Tensor = self.embeddings(input_ids=batch.ids[None], **positions)
        return out.squeeze(0)

    def run(self, hidden: Tensor, layout: Layout, first: int, last: int, rows: Tensor | None = None) -> Tensor:
        """Run hidden [T, D] through layers `first` to `last` - 1, each sequence on its own. Families with a final norm
        apply it after layer L.

        `rows` [R] int64: the only rows of the result that are read. The last of these layers attends to all tokens,
        but computes nothing else for the other rows; the result is [R, D].
        """
        flat, angles, layers = hidden[None], {}, self.layers[first:last]
        for layer in layers:
            inputs: dict[str, Any] = {"layout": layout}
            if self.rotary:
                kind = layer.attention_type
                if kind not in angles:
                    angles[kind] = self.rotary(flat, layout.positions[None], kind)
                inputs["position_embeddings"] = angles[kind]
            read = rows if layer is layers[-1] else None
            if layer.gradient_checkpointing and layer.training:
                flat = checkpoint(self._layer, layer, flat, read, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                flat = self._layer(layer, flat, read, inputs)
        if self.norm is not None and first < last == len(self.layers):
            flat = self.norm(flat)
        return flat.squeeze(0)

    def states(self, batch: FlatBatch) -> Iterator[Tensor]:
        """The embeddings and the output of each layer, [T, D], as `hidden_states` of transformers. A layer runs when
        its output is asked for."""
        hidden = self.embed(batch)
        yield hidden
        for layer in range(len(self.layers)):
            hidden = self.run(hidden, batch.layout, layer, layer + 1)
            yield hidden

    def _layer(self, layer: nn.Module, flat: Tensor, rows: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """One layer on [1, T, D], of which only `rows` go on after attention."""
        context = self._family.attend(layer, flat, **inputs)
        if rows is not None:
            context, flat = context.index_select(1, rows), flat.index_select(1, rows)
        return self._finish(layer, context, flat)


class SentenceEncoder(nn.Module):
    """Embeddings, the first K layers and the sentence head: all that a representation for the contrast needs."""

    def __init__(self, body: Body, head: SentenceHead) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, batch: FlatBatch) -> Tensor:
        """Representations [S, D] of the sequences."""
        body, read = self.body, self.head.reads(batch.layout)
        out: Tensor = self.head(body.run(body.embed(batch), batch.layout, 0, len(body.layers), read), batch.layout)
        return out

    def by_layer(self, batch: FlatBatch) -> Tensor:
        """The pooled states of the embeddings and of each layer, then the representations, [S, K + 2, D] in
        fp32."""
        found = [pool(hidden, batch.layout, self.head.pooling) for hidden in self.body.states(batch)]
        return torch.stack([x.float() for x in (*found, self.head.finish(found[-1]))], dim=1)


class InfoXLM(nn.Module):
    """An encoder with its masked LM head and a sentence head at the universal layer."""

    def __init__(self, lm: PreTrainedModel, head: SentenceHead, universal_layer: int) -> None:
        super().__init__()
        self.lm, self.head, self.universal_layer = lm, head, universal_layer
        self.compiled = False

    @property
    def body(self) -> Body:
        """All layers, without the heads. It shares these weights."""
        return Body(self.lm.base_model, compiled=self.compiled)

    def forward(self, batch: FlatBatch, trunk: Layout, queries: Layout, masked: Tensor) -> tuple[Tensor, Tensor]:
        """One pass for all losses. The batch holds the trunk, which is the sequences of MMLM and TLM, and then the
        contrast's queries. The queries leave after the universal layer. `masked` [M]: the masked rows of the trunk.

        Returns the last layer's states of the masked rows [M, D], and the queries' representations [S, D].
        """
        body, middle = self.body, self.universal_layer
        ends, firsts = middle == len(body.layers), self.head.reads(queries)  # ends: the trunk leaves there too
        read, sizes = None, [trunk.tokens, queries.tokens]
        if ends or (firsts is not None and queries.tokens):
            kept = masked if ends else torch.arange(trunk.tokens, device=masked.device)
            leaving = torch.arange(queries.tokens, device=masked.device) if firsts is None else firsts
            read, sizes = torch.cat([kept, leaving + trunk.tokens]), [len(kept), len(leaving)]
        states, vectors = body.run(body.embed(batch), batch.layout, 0, middle, read).split(sizes)
        if not ends:
            states = body.run(states, trunk, middle, len(body.layers), masked) if trunk.tokens else states[masked]
        return states, self.head(vectors, queries)

    def sentence_encoder(self) -> SentenceEncoder:
        """The part that the contrast trains. It shares these weights."""
        return SentenceEncoder(Body(self.lm.base_model, self.universal_layer, self.compiled), self.head)
