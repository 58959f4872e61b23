"""A tiny XLM-R with a real SentencePiece vocabulary, as a Hugging Face folder."""

import io
from pathlib import Path

import sentencepiece
import torch
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaTokenizer

SENTENCES = [
    "The lamp is on.",
    "Open the door, please.",
    "The temperature in the kitchen is 21 degrees.",
    "Лампа включена.",
    "Откройте, пожалуйста, дверь.",
    "Температура на кухне 21 градус.",
    "Das Licht ist an.",
    "Bitte öffne die Tür.",
    "Die Temperatur in der Küche beträgt 21 Grad.",
]


def write_tiny_xlmr(folder: Path) -> None:
    """Three layers of width 32, at most 34 tokens, universal layer 2 (the layer that the
    contrast reads), random weights."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=36,
        type_vocab_size=1,
        initializer_range=0.3,
        universal_layer=2,
    )
    XLMRobertaForMaskedLM(config).save_pretrained(folder)


def _tokenizer() -> XLMRobertaTokenizer:
    """XLM-R's vocabulary: its own four special tokens, then SentencePiece's pieces."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=trained, vocab_size=76, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*special, *pieces])
