"""What the sentence vector of a model folder is. The folder's config.json says it, and all that embeds reads it here.

A sentence vector is the pooled states of one layer, times the projection if there is one, divided by its L2 norm.
A folder's own vector is what the contrast trained: the universal layer (the inner layer that the contrast reads), the
pooling and, if it was trained, the projection. Any other layer or pooling has no trained projection.

Legend: T tokens, S sequences, D width, L layers asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from infoxlm_ds.config import Pooling, UserError
from infoxlm_ds.data.flat_batch import FlatBatch
from infoxlm_ds.model.encoder import Body
from infoxlm_ds.model.heads import pool
from infoxlm_ds.model.loading import loading

PROJECTION = "projection.safetensors"  # beside the weights of a Hugging Face folder


@dataclass(frozen=True)
class SentenceVector:
    """`layers`: numbered as Hugging Face's `hidden_states`: 0 is the embeddings, i the output of the i-th layer.
    `projected`: whether the folder's projection follows; then there is one layer."""

    layers: tuple[int, ...]
    pooling: Pooling
    projected: bool = False

    def write(self, config: PreTrainedConfig) -> None:
        """Make this the own vector of the folder that gets this config. There must be one layer."""
        (config.sentence_layer,) = self.layers
        config.sentence_pooling, config.sentence_projection = self.pooling, self.projected


def own_vector(config: PreTrainedConfig) -> SentenceVector:
    """The own vector of a folder with this config. In a config without our keys: the mean over the last layer."""
    last = config.num_hidden_layers
    layer = getattr(config, "sentence_layer", getattr(config, "universal_layer", last))
    return SentenceVector(
        (layer,), getattr(config, "sentence_pooling", "mean"), getattr(config, "sentence_projection", False)
    )


def chosen_vector(
    config: PreTrainedConfig, layers: int | Literal["all"] | None, pooling: Pooling | None, where: str
) -> SentenceVector:
    """The vector of a folder as a user changed it: another layer, or all of them, or another pooling. Then there is
    no projection. UserError if the model, whose name is `where`, has no such layer."""
    own, last = own_vector(config), config.num_hidden_layers
    numbers = own.layers if layers is None else tuple(range(last + 1)) if layers == "all" else (layers,)
    if not 0 <= numbers[0] <= last:
        raise UserError(f"layer {numbers[0]} is out of range: {where} has layers 0 (embeddings) to {last}")
    projected = own.projected and layers is None and pooling is None
    return SentenceVector(numbers, own.pooling if pooling is None else pooling, projected)


def pooled(body: Body, batch: FlatBatch, vector: SentenceVector, projection: Tensor | None) -> Tensor:
    """[S, L, D], not yet normalised. A layer is pooled as soon as it is computed, so one layer's tokens [T, D] are in
    memory at a time, and layers above the highest one do not run. `projection` [D, D]: the weights, if
    `vector.projected`."""
    hidden = enumerate(islice(body.states(batch), vector.layers[-1] + 1))
    found = [pool(x, batch.layout, vector.pooling) for layer, x in hidden if layer in vector.layers]
    states = torch.stack(found, dim=1)
    return states if projection is None else states @ projection.T


def read_projection(folder: Path) -> Tensor:
    """The projection [D, D] of a folder. UserError if it is missing or damaged."""
    with loading(f"model folder {folder}: its {PROJECTION} does not load"):
        return load_file(folder / PROJECTION)["weight"]


def write_projection(weight: Tensor, folder: Path) -> None:
    """Write the projection [D, D] beside the weights."""
    save_file({"weight": weight.detach().contiguous()}, folder / PROJECTION)
