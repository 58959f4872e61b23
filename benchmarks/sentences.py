"""Training of the contrast alone as sentence-transformers does it, with its cached loss (Gao et al. 2021)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.models import Normalize, Pooling, Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.cases import Work
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.pretrained import strip_vocabulary

Features = list[dict[str, Tensor]]  # first sides and second sides of pairs


class SentenceTransformers:
    """A step on all pairs of a step's lanes. `mini_batch`: sequences of one pass. `by_length`: pairs are sorted, so
    that a pass has less padding."""

    def __init__(self, work: Work, mini_batch: int, by_length: bool, rank: int, world: int) -> None:
        recipe = work.recipe
        self._model = sentence_model(work.model, str(work.corpus.tokenizer))
        self._clip = recipe.optimizer.clip
        self._loss = CachedMultipleNegativesRankingLoss(
            self._model,
            scale=1 / recipe.contrast.temperature,
            mini_batch_size=mini_batch,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        settings = recipe.optimizer
        self._adamw = torch.optim.AdamW(
            self._model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        pad = work.corpus.manifest.tokenizer.special_ids["pad"]
        self._features = [padded_sides(lanes, pad, by_length) for lanes in work.batches]
        self._steps, self._last = 0, 0.0

    def step(self) -> None:
        features = [dict(side) for side in self._features[self._steps % len(self._features)]]
        self._steps += 1
        loss = self._loss(features, torch.empty(0))
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._adamw.step()
        self._adamw.zero_grad()
        self._last = loss.item()

    def losses(self) -> dict[str, float]:
        return {"xlco": self._last}


def sentence_model(model: InfoXLM, tokenizer: str) -> SentenceTransformer:
    """The layers up to the universal layer, with the mean of the tokens as the representation."""
    body = strip_vocabulary(copy.deepcopy(model.lm)).base_model
    body.encoder.layer = body.encoder.layer[: model.universal_layer]
    body.config.num_hidden_layers = model.universal_layer
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="infoxlm-") as folder:
        body.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        transformer = Transformer(folder, model_kwargs={"attn_implementation": "sdpa", "add_pooling_layer": False})
    pooling = Pooling(body.config.hidden_size, pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").train()


def padded_sides(lanes: Sequence[JointBatch], pad: int, by_length: bool) -> Features:
    """All pairs of these lanes, which have no other task."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for lane in lanes:
        sequences = lane.tokens.ids.split(lane.tokens.layout.lengths.tolist())
        pairs += zip(sequences[: lane.sides.first], sequences[lane.sides.first :], strict=True)
    if by_length:
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    return [
        {
            "input_ids": pad_sequence(list(side), batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in side], batch_first=True),
        }
        for side in zip(*pairs, strict=True)
    ]
