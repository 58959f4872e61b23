"""What an export writes: a checkpoint's model, its tokenizer, its sentence vector, and texts to check copies with.

Legend: n texts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from infoxlm_ds.checkpoint.weights import Weights
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.evaluation.embed import embed
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.model.encoder import Body, InfoXLM
from infoxlm_ds.model.families import positions_of
from infoxlm_ds.model.pretrained import saved_shape, strip_vocabulary
from infoxlm_ds.model.sentence_vector import SentenceVector, pooled

VECTORS = 1e-5  # the largest difference of a component of two equal vectors of length 1, in fp32
SAMPLE = [
    "Hello, world!",
    "Zwei Sprachen, ein Satz.",
    "Ещё одно предложение, чуть длиннее первого.",
    "文の意味は同じです。",
]


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be written. `model.lm.config` says what the sentence vector is."""

    recipe: Recipe
    model: InfoXLM
    tokenizer: Any
    vector: SentenceVector

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that the model takes; longer texts are cut."""
        return positions_of(self.model.lm.config)

    @property
    def projection(self) -> Tensor | None:
        """The trained projection [D, D], whether the sentence vector has it or not."""
        head = self.model.head.projection
        return None if head is None else head.weight.detach()

    @property
    def texts(self) -> list[str]:
        """Texts of many lengths, scripts and signs; one is empty, and one is longer than the model takes."""
        long = " ".join(SAMPLE * self.positions)
        return [*SAMPLE, "", "a", "naïve ﬁancé \U0001f600 क्षि", " ".join(SAMPLE * 2), long]

    @cached_property
    def expected(self) -> Vectors:
        """The sentence vectors [n, D] of `texts`, as our own evaluation computes them."""
        body = Body(self.model.lm.base_model, self.vector.layer)
        projection = self.projection if self.vector.projected else None

        @torch.no_grad()
        def encode(batch: Any) -> Tensor:
            return pooled(body, batch, [self.vector.view], projection)[:, 0]

        return embed(self.texts, self.tokenizer, self.positions, encode, torch.device("cpu"), quiet=True)

    def difference(self, vectors: Vectors) -> float:
        """The largest difference of a component of `expected`."""
        return float(np.abs(vectors - self.expected).max())


def read_trained(recipe: Recipe, run: Path, checkpoint: Path, layer: int | None) -> Trained:
    """The model of a checkpoint. Its sentence vector is what the run trained or, with `layer`, the plain states of that
    layer. UserError if there is no such layer."""
    model, weights = saved_shape(run / "model", recipe.model), Weights(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters(prefix="model"):  # as the objective calls it
            parameter.copy_(weights[name])
    strip_vocabulary(model.lm)
    last = model.lm.config.num_hidden_layers
    if layer is not None and not 0 <= layer <= last:
        raise UserError(f"--layer {layer} is out of range: the model has layers 0 (embeddings) to {last}")
    universal = recipe.model.universal_layer
    projected = layer is None and recipe.model.projection
    vector = SentenceVector(universal if layer is None else layer, recipe.model.pooling, projected)
    model.lm.config.universal_layer = universal
    vector.write(model.lm.config)
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=False)
    tokenizer.model_max_length = positions_of(model.lm.config)  # truncation cuts a longer text, which would crash
    return Trained(recipe, model.eval(), tokenizer, vector)


def require(difference: float, most: float, folder: Path, message: str) -> None:
    """RuntimeError if a difference is above `most`, or is no number."""
    if not difference <= most:
        raise RuntimeError(f"{folder}: " + message.format(f"{difference:.1e}"))
