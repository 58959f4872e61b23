"""The corpus' tokenizer. It is trained here, with XLM-R's ids (`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, pieces,
`<mask>` last), or it exists and puts special tokens around texts as XLM-R's or BERT's does."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from data_prep.description import TokenizerDescription
from data_prep.sample import merge_samples
from infoxlm_ds.config import UserError
from infoxlm_ds.data import manifest as manifests
from infoxlm_ds.data.files import File

THREADS = 2  # fixed, because another number gives another model
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TokenizerTask(NamedTuple):
    """`samples`: what `sample_block` wrote, if a tokenizer is to be trained."""

    description: TokenizerDescription
    base: Path
    samples: tuple[Path, ...]


def make_tokenizer(task: TokenizerTask, out: Path) -> None:
    """Train a tokenizer or copy an existing one, and write it to the new folder `out`, which AutoTokenizer loads."""
    description = task.description
    if description.path is None:
        assert description.vocab_size is not None
        texts = merge_samples(task.samples, description.sentences, description.alpha)
        if not texts:
            raise UserError("no text is left after cleaning to train a tokenizer on: check the sources and filters")
        _train(texts, description.vocab_size, description.character_coverage, out)
    else:
        _copy(description.path, task.base, out)


def _specials(folder: Path | str) -> dict[str, Any]:
    """`special_ids` and `separators` of a tokenizer, for the manifest. UserError if a special token is missing, or if
    the tokenizer places special tokens differently from the batch builder."""
    tokenizer = _load(folder)
    names = {"bos": ("cls", "bos"), "pad": ("pad",), "eos": ("sep", "eos"), "unk": ("unk",), "mask": ("mask",)}
    special_ids = {
        name: next((i for t in tried if (i := getattr(tokenizer, f"{t}_token_id", None)) is not None), None)
        for name, tried in names.items()
    }
    if missing := [name for name, number in special_ids.items() if number is None]:
        raise UserError(f"{folder}: the tokenizer has no {', '.join(missing)} token: use a tokenizer for a masked LM")
    bos, eos, text = special_ids["bos"], special_ids["eos"], tokenizer("a", add_special_tokens=False)["input_ids"]
    single, pair = tokenizer("a")["input_ids"], tokenizer("a", "a")["input_ids"]
    separators = len(pair) - 2 * len(text) - 2
    if single != [bos, *text, eos] or pair != [bos, *text, *[eos] * separators, *text, eos] or separators not in (1, 2):
        raise UserError(
            f"{folder}: the tokenizer makes {single} of one text and {pair} of two: only the forms "
            "<s> a </s></s> b </s> and [CLS] a [SEP] b [SEP] are supported"
        )
    return {"special_ids": special_ids, "separators": separators}


def load_fast(folder: Path) -> Tokenizer:
    """The fast tokenizer of a folder, without truncation and padding. It gives the same ids as AutoTokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # a published tokenizer stores the settings of its last use
    tokenizer.no_padding()
    return tokenizer


def describe_tokenizer(folder: Path, files: tuple[File, ...]) -> manifests.Tokenizer:
    """The manifest's entry for a tokenizer folder."""
    fast = load_fast(folder)
    name = type(fast.model).__name__.lower()  # unigram, wordpiece, bpe
    return manifests.Tokenizer(name=name, vocab_size=fast.get_vocab_size(), files=files, **_specials(folder))


def _train(texts: list[str], vocab_size: int, coverage: float, out: Path) -> None:
    from transformers import XLMRobertaTokenizer

    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=trained,
            model_type="unigram",
            vocab_size=vocab_size - 2,  # sentencepiece's three special tokens become XLM-R's five
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


def _copy(name: str, base: Path, out: Path) -> None:
    folder: Path | str = base / name
    if not (base / name).is_dir() and HUB_NAME.fullmatch(name):
        folder = name
    elif not (base / name / "tokenizer_config.json").is_file() and not (base / name / "tokenizer.json").is_file():
        raise UserError(f"tokenizer.path: {folder} holds no tokenizer: set a Hugging Face folder, or a name on its hub")
    _specials(folder)  # fails early if the tokenizer is not supported
    _load(folder).save_pretrained(out)
    if not (out / "tokenizer.json").is_file():
        raise UserError(f"tokenizer.path: {folder} has no fast tokenizer")


def _load(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=isinstance(folder, Path))
    except Exception as error:  # each kind of tokenizer file raises its own error
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {reason}") from None
