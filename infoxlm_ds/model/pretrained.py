"""From a recipe to a model: a fresh XLM-R of the given shape, or the weights of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForMaskedLM

from infoxlm_ds.config import Model, UserError
from infoxlm_ds.model.attention import PACKED
from infoxlm_ds.model.encoder import PADDING_ID, InfoXLM
from infoxlm_ds.model.heads import SentenceHead

PROJECTION = "projection.safetensors"  # beside the weights of a Hugging Face folder


def build_model(model: Model, vocabulary: int, seed: int) -> InfoXLM:
    """The model of a recipe for a vocabulary of this size. Random weights depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = assemble(_load(model) if model.init else XLMRobertaForMaskedLM(_shape(model, vocabulary)), model)
    assert built.lm.config.vocab_size == vocabulary, "check_fit compares the tokenizers"
    projection = model.init / PROJECTION if model.init else None
    if projection is not None and projection.is_file() and built.head.projection is not None:
        built.head.projection.load_state_dict(load_file(projection))
    return built


def assemble(lm: XLMRobertaForMaskedLM, model: Model) -> InfoXLM:
    """An XLM-R with the sentence head of a recipe."""
    head = SentenceHead(lm.config.hidden_size, model.pooling, model.projection, model.normalize)
    return InfoXLM(lm, head, model.universal_layer)


def check_fit(model: Model, tokenizer_folder: Path, longest: int) -> None:
    """UserError where the corpus cannot go into the model: another tokenizer than `init` has, or too few positions.

    `longest`: tokens of the longest sequence that the corpus can give, special tokens included.
    """
    positions = model.positions
    if model.init:
        if not (model.init / "config.json").is_file():
            raise UserError(f"model.init {model.init}: no config.json there: give a Hugging Face folder")
        if not any(model.init.glob("*.safetensors")) and not any(model.init.glob("*.bin")):
            raise UserError(f"model.init {model.init}: no *.safetensors and no *.bin there: give a whole model folder")
        config = XLMRobertaConfig.from_pretrained(model.init)
        if model.universal_layer > config.num_hidden_layers:
            raise UserError(
                f"model.universal_layer {model.universal_layer} is above the {config.num_hidden_layers} layers of "
                f"{model.init}"
            )
        positions = config.max_position_embeddings - PADDING_ID - 1
        ours, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tokenizer_folder, model.init))
        if ours != theirs:
            raise UserError(
                f"the corpus was prepared with another tokenizer than {model.init} has: set tokenizer.path to that "
                "folder in the corpus description and run `infoxlm prep build` again"
            )
    if longest > positions:
        raise UserError(
            f"the corpus has sequences of {longest} tokens, the model {positions} positions: "
            f"set model.positions to {longest} or prepare the corpus with a smaller max_tokens"
        )


def _shape(model: Model, vocabulary: int) -> XLMRobertaConfig:
    return XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.feed_forward,
        max_position_embeddings=model.positions + PADDING_ID + 1,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=PADDING_ID,
        eos_token_id=2,
        attn_implementation=PACKED,
    )


def _load(model: Model) -> XLMRobertaForMaskedLM:
    lm = XLMRobertaForMaskedLM.from_pretrained(model.init, attn_implementation=PACKED, dtype=torch.float32)
    for module in lm.modules():  # InfoXLM trains without dropout; the configuration keeps its own for what comes after
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lm
