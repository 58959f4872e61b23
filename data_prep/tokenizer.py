"""The corpus' tokenizer, with XLM-R's ids: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, pieces, `<mask>` last."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from data_prep.description import TokenizerDescription
from infoxlm_ds.config import UserError

THREADS = 2  # fixed: another number gives another model
SPECIAL = {"bos": 0, "pad": 1, "eos": 2, "unk": 3}  # the layout that the batch builder relies on


def make_tokenizer(description: TokenizerDescription, base: Path, texts: Iterable[str], seed: int, out: Path) -> None:
    """Write the tokenizer to `out`, as a folder that AutoTokenizer loads: trained on `texts`, or an existing one
    copied."""
    if description.path is None:
        assert description.vocab_size is not None
        sample = _sample(texts, description.sentences, seed)
        _train(sample, description.vocab_size, description.character_coverage, out)
    else:
        _copy(base / description.path, out)


def special_ids(folder: Path) -> dict[str, int]:
    """bos, pad, eos, unk and mask of a tokenizer folder. UserError where they are not XLM-R's."""
    tokenizer = _load(folder)
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in (*SPECIAL, "mask")}
    if {name: found[name] for name in SPECIAL} != SPECIAL or found["mask"] is None:
        raise UserError(f"{folder}: special tokens {found} are not those of an XLM-R tokenizer {SPECIAL} with a mask")
    return found


def load_fast(folder: Path) -> Tokenizer:
    """The tokenizer alone, which gives the ids that AutoTokenizer gives: all of a text and nothing else."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # published tokenizers store the settings of their last use
    tokenizer.no_padding()
    return tokenizer


def _sample(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Different texts in sorted order, at most `count`: those with the smallest keyed hashes."""
    different = sorted(set(texts))
    if len(different) <= count:
        return different
    key = seed.to_bytes(8, "little", signed=True)
    hashes = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8, key=key).digest(), "little") for t in different]
    return [different[i] for i in sorted(np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")[:count])]


def _train(texts: list[str], vocab_size: int, coverage: float, out: Path) -> None:
    from transformers import XLMRobertaTokenizer

    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=trained,
            model_type="unigram",
            vocab_size=vocab_size - 2,  # its three special tokens become XLM-R's five
            character_coverage=coverage,
            num_threads=THREADS,
            shuffle_input_sentence=False,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"tokenizer.vocab_size {vocab_size} does not suit this text: {' '.join(str(error).split())}"
        ) from None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(trained.getvalue())
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces = [(piece.piece, piece.score) for piece in model.pieces[3:]]
    charsmap = model.normalizer_spec.precompiled_charsmap
    XLMRobertaTokenizer(vocab=[*special, *pieces, ("<mask>", 0.0)], _spm_precompiled_charsmap=charsmap).save_pretrained(
        out
    )


def _copy(folder: Path, out: Path) -> None:
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"tokenizer.path: {folder} holds no tokenizer: give a Hugging Face folder")
    special_ids(folder)  # refuses another layout before any text is tokenised
    _load(folder).save_pretrained(out)
    if not (out / "tokenizer.json").is_file():
        raise UserError(f"tokenizer.path: {folder} has no fast tokenizer")


def _load(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer file has its own
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {reason}") from None
