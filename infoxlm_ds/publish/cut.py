"""Encoders for other libraries: the first layers of a trained masked LM as a plain model of transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModel, PreTrainedModel

from infoxlm_ds.model.families import family_of


@dataclass(frozen=True)
class Cut:
    """An encoder that computes a layer of another one. `state`: which of its `hidden_states` is that layer; None if it
    is the last one, as the model gives it."""

    model: PreTrainedModel
    state: int | None


def whole_encoder(lm: PreTrainedModel) -> PreTrainedModel:
    """The encoder of a masked LM, with all layers."""
    return _first_layers(lm, lm.config.num_hidden_layers)


def cut_encoder(lm: PreTrainedModel, layer: int) -> Cut:
    """The encoder of a masked LM up to a layer, 0 (the embeddings) to L.

    Some families normalise once more after their last layer, and no configuration turns that off. If `layer` is not the
    last one, such an encoder keeps one layer more, whose result is not read.
    """
    last = lm.config.num_hidden_layers
    if family_of(lm.config).norm is None or layer == last:
        return Cut(_first_layers(lm, layer), None)
    return Cut(_first_layers(lm, layer + 1), layer)


def _first_layers(lm: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of so many layers. Families with a pooler get one with random weights, as nothing trained it: without
    them, transformers would warn of weights that are missing."""
    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    names = model.state_dict().keys()
    trained = {name: value for name, value in lm.base_model.state_dict().items() if name in names}
    report = model.load_state_dict(trained, strict=False)
    lost = [name for name in report.missing_keys if not name.startswith("pooler.")]
    assert not lost, f"{lost} are not in the trained model"
    return model.eval()
