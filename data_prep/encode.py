"""Turns texts into ids: with SentencePiece's own C++ where it gives the same ids as the tokenizer, which it does nine
times as fast for XLM-R's kind, else with the tokenizers library."""

from __future__ import annotations

import base64
import itertools
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as messages

from data_prep.tokenizer import load_fast

CHUNK = 20_000  # texts in one call
# Texts on which the two would differ if they treat something differently: spaces, case, composition, other scripts,
# characters without a piece, controls, and what looks like a special token.
PROBES = [
    "",
    "a",
    "Hello, world! 1,234.56 % - https://example.org/a?b=c&d",
    "  two  spaces\u3000and\u00a0others ",
    "Größe ÄÖÜß ñ ç Ångström e\u0301 ﬁ ½ ™ Ⅷ ｆｕｌｌ",
    "Привет, мир! Ещё 3 раза.",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया १२३",
    "文の意味は同じです。한국어 문장입니다.中文，句子。",
    "ภาษาไทยไม่มีช่องว่าง",
    "😀👩‍👩‍👧 \U0001f1e9\U0001f1ea \u200b\u200d\ufeff",
    "\u2581a\u2581 ▁▁b",
    "𒀀𒁀 ꙮ \U000e0001",
    "x" * 300,
    "ААААА" * 40,
]


class Encoded(NamedTuple):
    """The ids of texts, one behind the other: `ids` uint32 [T], `lengths` int64 [n]; `spelled` int64 [n]: how many ids
    of each text would have been special tokens."""

    ids: np.ndarray
    lengths: np.ndarray
    spelled: np.ndarray


class Encoder:
    """A tokenizer folder as a function from texts to ids, without special tokens. If a text spells a special token,
    such as <mask>, it becomes <unk>: it is only text."""

    def __init__(self, folder: Path, unknown: int, pieces: bool) -> None:
        """`unknown`: the id of <unk>. `pieces`: use SentencePiece; see `agrees`."""
        self._fast, self._unknown = load_fast(folder), unknown
        added = self._fast.get_added_tokens_decoder()
        self._special = [number for number, token in added.items() if token.special and number != unknown]
        self._spells = re.compile("|".join(re.escape(token.content) for token in added.values()) or r"(?!)")
        self._pieces = self._rebuilt if pieces else None

    @cached_property
    def _rebuilt(self) -> Any:
        return rebuild(json.loads(self._fast.to_str()))

    def encode(self, texts: list[str]) -> Encoded:
        """The ids of texts, in their order."""
        parts = [self._chunk(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
        none = np.zeros(0, np.int64)
        return Encoded(*map(np.concatenate, zip(Encoded(none.astype(np.uint32), none, none), *parts, strict=True)))

    def _chunk(self, texts: list[str]) -> Encoded:
        lists: list[list[int]]
        if self._pieces is None:
            lists = self._by_tokenizer(texts)
        else:
            lists = self._pieces.encode(texts, num_threads=1)
            special = [i for i, text in enumerate(texts) if self._spells.search(text)]
            for i, ids in zip(special, self._by_tokenizer([texts[i] for i in special]), strict=True):
                lists[i] = ids
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        flat = np.fromiter(itertools.chain.from_iterable(lists), np.uint32, int(lengths.sum()))
        spelled = np.isin(flat, self._special)
        flat[spelled] = self._unknown
        of_text = np.repeat(np.arange(len(lists)), lengths)[spelled]
        return Encoded(flat, lengths, np.bincount(of_text, minlength=len(lists)))

    def _by_tokenizer(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def agrees(self, texts: list[str]) -> bool:
        """Whether SentencePiece gives the same ids for these texts and for PROBES."""
        if self._rebuilt is None:
            return False
        tried = [text for text in [*PROBES, *texts] if not self._spells.search(text)]
        return bool(self._rebuilt.encode(tried, num_threads=1) == self._by_tokenizer(tried))


def rebuild(tree: Any) -> sentencepiece.SentencePieceProcessor | None:
    """SentencePiece's model from the tree of a `tokenizer.json`; None if that is no unigram model."""
    model = tree["model"]
    if model.get("type", "Unigram") != "Unigram" or "vocab" not in model or model.get("unk_id") is None:
        return None
    special = {token["id"] for token in tree["added_tokens"]}
    proto = messages.ModelProto()
    kinds = messages.ModelProto.SentencePiece
    for number, (piece, score) in enumerate(model["vocab"]):
        kind = kinds.UNKNOWN if number == model["unk_id"] else kinds.CONTROL if number in special else kinds.NORMAL
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = messages.TrainerSpec.UNIGRAM
    proto.trainer_spec.unk_id = model["unk_id"]
    proto.trainer_spec.bos_id = proto.trainer_spec.eos_id = proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "rebuilt"
    proto.normalizer_spec.precompiled_charsmap = _charsmap(tree.get("normalizer"))
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError:  # it has no use for this vocabulary
        return None


def _charsmap(normalizer: Any) -> bytes:
    """The table of characters of a normaliser or of a sequence of them."""
    for part in (normalizer or {}).get("normalizers", [normalizer]):
        if part and part["type"] == "Precompiled":
            return base64.b64decode(part["precompiled_charsmap"])
    return b""
