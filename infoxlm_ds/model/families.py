"""The encoders of transformers that can run on a flat batch, and where each of them keeps its parts.

A family needs the attention interface of transformers, and a stack of layers that takes one flat row of tokens. One
line in FAMILIES adds a family. tests/model/test_families.py compares every family with transformers on padded batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from infoxlm_ds.config import UserError


def _attend(layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = layer.attention.self(hidden, **kwargs)[0]
    return out


def _attend_normed(layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
    return _attend(layer, layer.attention.self_attn_layer_norm(hidden), **kwargs)


def _finish(layer: Any, context: Tensor, hidden: Tensor) -> Tensor:
    out: Tensor = layer.feed_forward_chunk(layer.attention.output(context, hidden))
    return out


def _attend_rotary(layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = layer.attn(layer.attn_norm(hidden), **kwargs)[0]
    return out


def _finish_rotary(layer: Any, context: Tensor, hidden: Tensor) -> Tensor:
    hidden = hidden + context
    out: Tensor = hidden + layer.mlp(layer.mlp_norm(hidden))
    return out


@dataclass(frozen=True)
class Family:
    """How a family is built.

    `features`: the masked LM head without the vocabulary matrix, which maps rows [M, D] to [M, D]. A layer is
    `finish(layer, attend(layer, hidden), hidden)`: `attend` mixes tokens, and `finish` works on each row alone. The
    rest are attribute paths below the base model.
    """

    features: Callable[[Any, Tensor], Tensor]
    attend: Callable[..., Tensor] = _attend
    finish: Callable[[Any, Tensor, Tensor], Tensor] = _finish
    layers: str = "encoder.layer"
    norm: str | None = None  # after the last layer, in families that normalise before each block
    rotary: str | None = None  # set if positions enter in the layers and not in the embeddings
    counts_from_padding: bool = False  # position ids begin after the padding id


def _roberta_features(lm: Any, rows: Tensor) -> Tensor:
    head = lm.lm_head
    out: Tensor = head.layer_norm(gelu(head.dense(rows)))
    return out


FAMILIES = {
    "xlm-roberta": Family(_roberta_features, counts_from_padding=True),
    "roberta": Family(_roberta_features, counts_from_padding=True),
    "camembert": Family(_roberta_features, counts_from_padding=True),
    "xlm-roberta-xl": Family(
        _roberta_features, attend=_attend_normed, norm="encoder.LayerNorm", counts_from_padding=True
    ),
    "bert": Family(lambda lm, rows: lm.cls.predictions.transform(rows)),
    "modernbert": Family(
        lambda lm, rows: lm.head(rows),
        attend=_attend_rotary,
        finish=_finish_rotary,
        layers="layers",
        norm="final_norm",
        rotary="rotary_emb",
    ),
}


@cache
def compile_finish(family: Family) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """`finish`, compiled: few graphs for all layers and numbers of rows, with and without gradients. Attention and what
    varies in shape stay outside."""
    return torch.compile(family.finish, dynamic=True)


def family_of(config: PreTrainedConfig, where: str = "the model") -> Family:
    """The family of a model. UserError with the reason if it cannot run on a flat batch. `where`: the
    user's name for it."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise UserError(f"{where} is a {kind}: {_reason(kind, config)}; known are {', '.join(FAMILIES)}")
    if getattr(config, "is_decoder", False):
        raise UserError(f"{where} is a decoder and hides later tokens: set is_decoder to false in its config.json")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        raise UserError(
            f"{where} has position_embedding_type {config.position_embedding_type}, which transformers no longer runs"
        )
    return FAMILIES[kind]


def _reason(kind: str, config: PreTrainedConfig) -> str:
    if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "transformers has no masked LM head for it"
    if not MODEL_FOR_MASKED_LM_MAPPING[type(config)]._supports_attention_backend:
        return "it computes attention outside transformers' attention interface, so it cannot run on a flat batch"
    return "the places of its parts are not known: add a line to infoxlm_ds/model/families.py"


def positions_of(config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence that the model takes."""
    taken = config.pad_token_id + 1 if family_of(config).counts_from_padding else 0
    return int(config.max_position_embeddings - taken)


def part(model: PreTrainedModel, path: str | None) -> Any:
    """The module at an attribute path. None if the family has no such part."""
    return None if path is None else attrgetter(path)(model)
