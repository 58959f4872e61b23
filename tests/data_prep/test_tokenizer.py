"""The tokenizer has XLM-R's ids. The stored ids are those that the saved tokenizer folder gives."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, XLMRobertaConfig

from data_prep.build import build
from data_prep.clean import clean
from data_prep.tokenizer import load_fast
from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.packs import text_id
from infoxlm_ds.data.sequences import Texts, assemble
from tests.conftest import HubCache
from tests.corpus import LANGUAGES
from tests.data_prep.small import bag, describe, prepare, read_rows, stored, write_rows

TEXT: dict[str, Any] = {"name": "mono.en", "kind": "mono", "format": "text", "path": "t.txt", "languages": ["en"]}
ODD = [
    "two  spaces\tand\u00a0others\u3000here",
    "зима 😀😀 x😀y 𐍈 ꙮ ﷽",
    "cafe\u0301 ﬁne Ⅷ ½ ｶﾞ 값 각",
    "a\u200bb \ufeffc \u00ad d \u2581 e",
    "say <mask> and </s> and <s> <pad> <unk>",
]


@cache
def loaded(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_stored_ids_are_what_the_saved_tokenizer_gives(corpus: Path) -> None:
    auto = loaded(corpus / "tokenizer")
    assert type(auto).__name__.startswith("XLMRoberta")
    expected = []
    for row in read_rows(corpus.parent):
        ids = {code: auto(text, add_special_tokens=False)["input_ids"] for code, text in row.items()}
        sides = {code: (ids[code], text_id(row[code])) for code in row if len(ids[code]) <= 48}
        if len(sides) >= 2:
            expected.append(sides)
    assert {code for row in expected for code in row} == set(LANGUAGES)
    assert bag(stored(Corpus(corpus), "nway.rows")) == bag(expected)


def test_the_tokenizer_has_xlm_rs_ids_and_the_size_asked_for(corpus: Path) -> None:
    auto = loaded(corpus / "tokenizer")
    assert auto.convert_ids_to_tokens([0, 1, 2, 3, 799]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert len(auto) == Corpus(corpus).manifest.tokenizer.vocab_size == 800
    assert Corpus(corpus).manifest.tokenizer.special_ids == {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 799}


OFF = dict.fromkeys(("letters", "script", "repetition", "copied_words", "length_ratio"))


def test_odd_text_gives_the_same_ids_and_never_a_special_token(corpus: Path, tmp_path: Path) -> None:
    auto = loaded(corpus / "tokenizer")
    rows = [{"en": text, "de": f"Satz {i}"} for i, text in enumerate(ODD)]
    write_rows(tmp_path / "odd.jsonl", rows)
    odd = {"name": "nway.odd", "kind": "nway", "format": "jsonl", "path": "odd.jsonl"}
    prepared = prepare(tmp_path, corpus, [odd], filters=OFF)
    found = {row["en"][1]: row["en"][0] for row in stored(prepared, "nway.odd")}
    for text in ODD:
        wanted = auto(text, add_special_tokens=False)["input_ids"]
        assert found[text_id(text)] == [3 if token in (0, 1, 2, 799) else token for token in wanted]
    assert prepared.manifest.counts["special_tokens_in_text"] == 4  # <unk> in the text stays <unk>


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_of_any_script_gives_the_ids_of_autotokenizer(corpus: Path, text: str) -> None:
    auto = loaded(corpus / "tokenizer")
    fast = load_fast(corpus / "tokenizer")
    for one in (text, clean(text)):
        assert fast.encode(one, add_special_tokens=False).ids == auto(one, add_special_tokens=False)["input_ids"]


def test_a_reused_tokenizer_keeps_its_vocabulary(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n", encoding="utf-8")
    again = prepare(tmp_path, corpus, [TEXT])
    name = Path("tokenizer") / "tokenizer.json"
    assert (again.path / name).read_bytes() == (corpus / name).read_bytes()
    here, there = again.manifest.tokenizer, Corpus(corpus).manifest.tokenizer
    assert (here.vocab_size, here.special_ids) == (there.vocab_size, there.special_ids)


def test_truncation_and_padding_stored_in_a_tokenizer_do_not_change_the_ids(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=10, pad_id=1, pad_token="<pad>")
    tokenizer.save(str(path))
    text = " ".join(map(str, range(1000, 1020)))
    tables = []
    for name, source in (("plain", corpus), ("changed", tmp_path)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text(f"{text}\nshort\n", encoding="utf-8")
        tables.append(bag(stored(prepare(tmp_path / name, source, [TEXT]), "mono.en")))
    assert tables[0] == tables[1]


VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "one": 5, "a": 6, "say": 7}


def test_a_bert_tokenizer_is_reused_with_its_own_layout(tmp_path: Path) -> None:
    bert = BertTokenizer(vocab=VOCABULARY)
    bert.save_pretrained(tmp_path / "bert" / "tokenizer")
    (tmp_path / "t.txt").write_text("one a\nsay [MASK] one\n", encoding="utf-8")
    corpus = prepare(tmp_path, tmp_path / "bert", [TEXT])
    tokenizer = corpus.manifest.tokenizer
    assert tokenizer.special_ids == {"bos": 2, "pad": 0, "eos": 3, "unk": 1, "mask": 4}
    assert tokenizer.separators == 1 and tokenizer.name == "wordpiece"
    assert [row["en"][0] for row in stored(corpus, "mono.en")] == [[5, 6, 7, 1, 5]]
    pool = np.array([5, 6, 7, 5], np.uint32)
    pair = assemble(pool, Texts(np.array([[0], [2]]), np.array([[2], [2]])), tokenizer)
    assert pair.ids.tolist() == bert("one a", "say one")["input_ids"]


def test_a_name_of_the_hub_is_found_in_its_cache(corpus: Path, tmp_path: Path, hub_cache: HubCache) -> None:
    folder = hub_cache("some/name")
    shutil.copytree(corpus / "tokenizer", folder, dirs_exist_ok=True)
    XLMRobertaConfig().save_pretrained(folder)
    (tmp_path / "t.txt").write_text("one\n", encoding="utf-8")
    build(describe(tmp_path, {"path": "some/name"}, [TEXT]), tmp_path / "corpus")
    assert Corpus(tmp_path / "corpus").manifest.tokenizer.vocab_size == 800
    with pytest.raises(UserError, match="some/other: the tokenizer cannot be loaded"):
        build(describe(tmp_path, {"path": "some/other"}, [TEXT]), tmp_path / "other")


def test_a_tokenizer_that_cannot_serve_is_refused_by_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n", encoding="utf-8")
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes" / "tokenizer")
    with pytest.raises(UserError, match=r"bytes/tokenizer: the tokenizer has no bos, mask token"):
        prepare(tmp_path, tmp_path / "bytes", [TEXT])
    backend = BertTokenizer(vocab=VOCABULARY).backend_tokenizer
    backend.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "layout" / "tokenizer")
    with pytest.raises(UserError, match=r"layout/tokenizer: the tokenizer makes \[6, 3\] of one text"):
        prepare(tmp_path, tmp_path / "layout", [TEXT])
    with pytest.raises(UserError, match=r"none/tokenizer holds no tokenizer"):
        prepare(tmp_path, tmp_path / "none", [TEXT])
    (tmp_path / "broken" / "tokenizer").mkdir(parents=True)
    (tmp_path / "broken" / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken/tokenizer: the tokenizer cannot be loaded"):
        prepare(tmp_path, tmp_path / "broken", [TEXT])
    assert not list(tmp_path.glob("corpus*/"))


def test_a_vocabulary_that_the_text_cannot_fill_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one two three\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size 5000"):
        build(describe(tmp_path, {"vocab_size": 5000}, [TEXT]), tmp_path / "corpus")
