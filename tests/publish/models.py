"""Models with random weights and a real tokenizer, as an export gets them from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    ModernBertConfig,
    XLMRobertaConfig,
    XLMRobertaXLConfig,
)

from infoxlm_ds.config import Model
from infoxlm_ds.model.attention import FLAT_ATTENTION
from infoxlm_ds.model.pretrained import assemble
from infoxlm_ds.model.sentence_vector import SentenceVector
from infoxlm_ds.publish.trained import Trained
from infoxlm_ds.reading import load_recipe

ROOT = Path(__file__).parents[2]
LAYERS, WIDTH, POSITIONS = 3, 32, 40
SHAPE: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 64, "initializer_range": 0.2, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "xlm-roberta": lambda v: XLMRobertaConfig(**SHAPE, **v, max_position_embeddings=POSITIONS + 2, type_vocab_size=1),
    "xlm-roberta-xl": lambda v: XLMRobertaXLConfig(
        **SHAPE, **v, max_position_embeddings=POSITIONS + 2, type_vocab_size=1
    ),
    "bert": lambda v: BertConfig(**SHAPE, **v, max_position_embeddings=POSITIONS),
    "modernbert": lambda v: ModernBertConfig(
        **SHAPE, **v, max_position_embeddings=POSITIONS, local_attention=8, cls_token_id=0, sep_token_id=2
    ),
}


def random_model(
    family: str, tokenizer_folder: Path, vector: SentenceVector, universal_layer: int = 2, projection: bool = True
) -> Trained:
    """A model of three layers of width 32 that takes 40 tokens. `projection`: whether it has a sentence projection."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.model_max_length = POSITIONS
    torch.manual_seed(3)
    config = CONFIGS[family]({"vocab_size": len(tokenizer)})
    lm = AutoModelForMaskedLM.from_config(config, attn_implementation=FLAT_ATTENTION)
    shape = Model(universal_layer=universal_layer, pooling=vector.pooling, projection=projection)
    lm.config.universal_layer = universal_layer
    vector.write(lm.config)
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", ["probe=null"])
    return Trained(recipe, assemble(lm, shape).eval(), tokenizer, vector)
