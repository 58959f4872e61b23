"""What the sentence vector of a model folder is. The folder's config.json says it, and all that embeds reads it here.

A sentence vector is the pooled states of one layer, times the projection if there is one, divided by its L2 norm.
A folder's own vector is what the contrast trained: the universal layer (the inner layer that the contrast reads), the
pooling and, if it was trained, the projection. Any other layer or pooling has no trained projection.

Legend: T tokens, S sequences, D width, V views asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

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


class View(NamedTuple):
    """Pooled states of one layer. `layer` is numbered as Hugging Face's `hidden_states`: 0 is the embeddings, i the
    output of the i-th layer."""

    layer: int
    pooling: Pooling


@dataclass(frozen=True)
class SentenceVector:
    """`projected`: whether the folder's projection follows."""

    layer: int
    pooling: Pooling
    projected: bool = False

    @property
    def view(self) -> View:
        """The states that it pools."""
        return View(self.layer, self.pooling)

    def write(self, config: PreTrainedConfig) -> None:
        """Make this the own vector of the folder that gets this config."""
        config.sentence_layer, config.sentence_pooling = self.layer, self.pooling
        config.sentence_projection = self.projected


def own_vector(config: PreTrainedConfig) -> SentenceVector:
    """The own vector of a folder with this config. In a config without our keys: the mean over the last layer."""
    last = config.num_hidden_layers
    layer = getattr(config, "sentence_layer", getattr(config, "universal_layer", last))
    return SentenceVector(
        layer, getattr(config, "sentence_pooling", "mean"), getattr(config, "sentence_projection", False)
    )


def chosen_views(
    config: PreTrainedConfig, layers: int | Literal["all"] | None, pooling: Pooling | Literal["both"] | None, where: str
) -> tuple[list[View], bool]:
    """The vectors that a user asks for, by rising layer, and whether the folder's projection follows: it does for the
    folder's own vector, which both None asks for. UserError if the model, whose name is `where`, has no such layer."""
    own, last = own_vector(config), config.num_hidden_layers
    numbers = range(last + 1) if layers == "all" else [own.layer if layers is None else layers]
    if not 0 <= numbers[0] <= last:
        raise UserError(f"layer {numbers[0]} is out of range: {where} has layers 0 (embeddings) to {last}")
    poolings: tuple[Pooling, ...] = ("mean", "cls") if pooling == "both" else (pooling or own.pooling,)
    views = [View(number, one) for number in numbers for one in poolings]
    return views, own.projected and layers is None and pooling is None


def pooled(body: Body, batch: FlatBatch, views: Sequence[View], projection: Tensor | None) -> Tensor:
    """[S, V, D] of views by rising layer, not yet normalised. A layer is pooled as soon as it is computed, so one
    layer's tokens [T, D] are in memory at a time, and layers above the highest one do not run. `projection` [D, D]: the
    weights, if the only view has one."""
    hidden = enumerate(islice(body.states(batch), views[-1].layer + 1))
    found = [pool(x, batch.layout, view.pooling) for layer, x in hidden for view in views if view.layer == layer]
    states = torch.stack(found, dim=1)
    return states if projection is None else states @ projection.T


def read_projection(folder: Path) -> Tensor:
    """The projection [D, D] of a folder. UserError if it is missing or damaged."""
    with loading(f"model folder {folder}: its {PROJECTION} does not load"):
        return load_file(folder / PROJECTION)["weight"]


def write_projection(weight: Tensor, folder: Path) -> None:
    """Write the projection [D, D] beside the weights."""
    save_file({"weight": weight.detach().contiguous()}, folder / PROJECTION)
