"""Makes the model of a recipe: a fresh encoder of the given shape, or the weights of a Hugging Face folder or name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from infoxlm_ds import dist
from infoxlm_ds.config import Model, UserError
from infoxlm_ds.model.attention import FLAT_ATTENTION
from infoxlm_ds.model.checksums import CHANGED, check_checksums
from infoxlm_ds.model.embedding import TiedEmbedding
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.families import FAMILIES, family_of, positions_of
from infoxlm_ds.model.heads import SentenceHead
from infoxlm_ds.model.loading import loading
from infoxlm_ds.model.sentence_vector import PROJECTION

VOCABULARY_MULTIPLE = 64  # matrices of other heights miss the GPU's fast kernels
XLM_R = {"bos": 0, "pad": 1, "eos": 2}


def build_model(model: Model, vocabulary: int, seed: int, special_ids: Mapping[str, int] = XLM_R) -> InfoXLM:
    """The model of a recipe for a vocabulary of this size. Random weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = _load(model.init) if model.init else _empty(shape_of(model, vocabulary, special_ids))
        assert lm.config.vocab_size >= vocabulary, "check_fit compares the tokenizers"
        built = assemble(lm, model)
        pad_vocabulary(lm)  # last, because it draws random numbers
    words, decoder = lm.get_input_embeddings(), lm.get_output_embeddings()
    if words.weight is decoder.weight:
        lm.set_input_embeddings(TiedEmbedding.of(words))
    projection = Path(model.init) / PROJECTION if model.init else None
    if projection is not None and projection.is_file() and built.head.projection is not None:
        with loading(f"model.init {model.init} has a {PROJECTION} that does not load"):
            built.head.projection.load_state_dict(load_file(projection))
    return built.train()


def assemble(lm: PreTrainedModel, model: Model) -> InfoXLM:
    """A masked LM with the sentence head of a recipe."""
    head = SentenceHead(lm.config.hidden_size, model.pooling, model.projection, model.normalize)
    return InfoXLM(lm, head, model.universal_layer)


def outline(model: Model, vocabulary: int, config: PreTrainedConfig | None = None) -> InfoXLM:
    """The model without storage, on torch's meta device: its parts, at no cost. `config`:
    the configuration of `model.init`."""
    config = shape_of(model, vocabulary) if config is None else copy.deepcopy(config)
    config.vocab_size = vocabulary
    with torch.device("meta"):
        return assemble(_empty(config), model)


def saved_shape(folder: Path, model: Model) -> InfoXLM:
    """An untrained model with the parts that `build_model` made for a run. `folder`: where the
    run saved its configuration."""
    return assemble(pad_vocabulary(_empty(AutoConfig.from_pretrained(folder, trust_remote_code=False))), model)


def pad_vocabulary(lm: PreTrainedModel) -> PreTrainedModel:
    """Append rows of zeros up to a multiple of VOCABULARY_MULTIPLE. `config.vocab_size` still
    counts only the pieces."""
    return _resize(lm, -(-lm.config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)


def strip_vocabulary(lm: PreTrainedModel) -> PreTrainedModel:
    """Remove the rows that `pad_vocabulary` added."""
    return _resize(lm, lm.config.vocab_size)


def check_fit(model: Model, tokenizer_folder: Path, longest: int) -> int:
    """The model's number of positions. UserError if the corpus does not fit the model: its tokenizer is not that of
    `init`, or its sequences need more positions.

    `longest`: tokens of the longest sequence that the corpus can give, special tokens included.
    """
    positions = model.positions
    if model.init:
        config = init_config(model.init)
        if model.universal_layer > config.num_hidden_layers:
            raise UserError(
                f"model.universal_layer {model.universal_layer} is above the {config.num_hidden_layers} layers of "
                f"{model.init}"
            )
        positions = positions_of(config)
        if AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False).get_vocab() != _tokenizer_of(
            model.init
        ):
            raise UserError(
                f"the corpus was prepared with another tokenizer than {model.init} has: set tokenizer.path to that "
                "name in the corpus description and run `infoxlm prep build` again"
            )
    if longest > positions:
        raise UserError(
            f"the corpus has sequences of {longest} tokens, the model {positions} positions: "
            f"set model.positions to {longest} or prepare the corpus with a smaller max_tokens"
        )
    return positions


def head_width(model: Model) -> int:
    """Width of an attention head of a recipe's model."""
    if not model.init:
        return model.width // model.heads
    config = init_config(model.init)
    return int(config.hidden_size // config.num_attention_heads)


class NoModel(UserError):
    """`model.init` is no folder, and no name that the hub gives now."""


def init_config(init: str) -> PreTrainedConfig:
    """The configuration of `model.init`. UserError if its encoder cannot run on a flat batch, NoModel if there is no
    configuration."""
    folder = Path(init)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.init {init}: no config.json there: give a Hugging Face folder")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise UserError(f"model.init {init}: no *.safetensors and no *.bin there: give a whole model folder")
        check_checksums(folder, CHANGED)
    with loading(f"model.init {init}: neither a model folder nor a name that the hub gives", NoModel):
        config = AutoConfig.from_pretrained(init, trust_remote_code=False)
    family_of(config, f"model.init {init}")
    return config


def shape_of(model: Model, vocabulary: int, special_ids: Mapping[str, int] = XLM_R) -> PreTrainedConfig:
    """The configuration of a fresh model."""
    family = FAMILIES[model.type]
    special: dict[str, float]
    if family.rotary:
        special = {"cls_token_id": special_ids["bos"], "sep_token_id": special_ids["eos"]}
    else:
        special = {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
        special |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoConfig.for_model(
        model.type,
        vocab_size=vocabulary,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.feed_forward,
        max_position_embeddings=model.positions + (special_ids["pad"] + 1 if family.counts_from_padding else 0),
        bos_token_id=special_ids["bos"],
        pad_token_id=special_ids["pad"],
        eos_token_id=special_ids["eos"],
        **special,
    )


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    return _without_dropout(
        AutoModelForMaskedLM.from_config(config, attn_implementation=FLAT_ATTENTION, dtype=torch.float32)
    )


def _load(init: str) -> PreTrainedModel:
    """The weights of a folder or of the hub: safetensors or the older .bin, in one file or in parts. A missing masked
    LM head starts at random, and a message says so."""
    set_verbosity_error()  # its report of missing weights would hide the line below
    if dist.rank() > 0:
        disable_progress_bar()
    options = {"attn_implementation": FLAT_ATTENTION, "dtype": torch.float32, "output_loading_info": True}
    with loading(f"model.init {init} has weights that do not load"):
        lm, report = AutoModelForMaskedLM.from_pretrained(init, trust_remote_code=False, **options)
    missing = sorted(report["missing_keys"])
    if lost := [name for name in missing if name.startswith(lm.base_model_prefix + ".")]:
        raise UserError(f"model.init {init} lacks {len(lost)} weights of its encoder, such as {lost[0]}")
    if missing and dist.rank() == 0:
        print(f"model.init {init} has no {', '.join(missing)}: they start at random")
    return _without_dropout(lm)


def _without_dropout(lm: PreTrainedModel) -> PreTrainedModel:
    """InfoXLM trains without dropout. The configuration keeps its own values for later use."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return lm


def _resize(lm: PreTrainedModel, rows: int) -> PreTrainedModel:
    pieces = lm.config.vocab_size
    lm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        lm.get_input_embeddings().weight[pieces:] = 0
        decoder = lm.get_output_embeddings()
        decoder.weight[pieces:] = 0
        decoder.bias[pieces:] = 0
    lm.config.vocab_size = pieces
    return lm


def _tokenizer_of(init: str) -> dict[str, int]:
    with loading(f"model.init {init} has no tokenizer that loads"):
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(init, trust_remote_code=False).get_vocab()
    return vocabulary
