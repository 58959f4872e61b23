"""Weights load from every form that Hugging Face folders have had. Every family of encoders trains from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaModel,
)

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Model, Recipe, UserError
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.pretrained import build_model, check_fit, init_config, shape_of
from infoxlm_ds.publish.export import export
from infoxlm_ds.publish.trained import SAMPLE
from infoxlm_ds.trainer import fit
from tests.conftest import HubCache
from tests.corpus import ROOT, small_recipe
from tests.data_prep.small import prepare
from tests.distributed.ranks import run_ranks

VOCABULARY = 800


def _model(kind: str = "xlm-roberta", **special_ids: int) -> PreTrainedModel:
    tree = {"type": kind, "layers": 2, "width": 32, "heads": 2, "feed_forward": 64, "positions": 128}
    shape = Model.model_validate(tree | {"universal_layer": 1})
    torch.manual_seed(7)
    config = shape_of(shape, VOCABULARY, special_ids or {"bos": 0, "pad": 1, "eos": 2})
    model: PreTrainedModel = AutoModelForMaskedLM.from_config(config)
    return model


def _as_bin(model: PreTrainedModel, folder: Path) -> None:
    """The form in which XLM-R and InfoXLM were published: one pickle in half precision, with a pooler and a buffer that
    later versions of transformers no longer save."""
    model.config.save_pretrained(folder)
    weights = {name: value.half() for name, value in model.state_dict().items()}
    weights["roberta.embeddings.position_ids"] = torch.arange(130)[None]
    weights |= {"roberta.pooler.dense.weight": torch.zeros(32, 32), "roberta.pooler.dense.bias": torch.zeros(32)}
    torch.save(weights, folder / "pytorch_model.bin")


def _as_bins(model: PreTrainedModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number in (0, 1):
        name = f"pytorch_model-0000{number + 1}-of-00002.bin"
        part = {key: weights[key] for key in sorted(weights)[number::2]}
        torch.save(part, folder / name)
        index["weight_map"] |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


SAVED = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "sharded safetensors": lambda model, folder: model.save_pretrained(folder, max_shard_size="60KB"),
    "bin": _as_bin,
    "sharded bin": _as_bins,
}


@pytest.mark.parametrize("kind", ["xlm-roberta", "xlm-roberta-xl"])
@pytest.mark.parametrize("form", SAVED)
def test_every_form_of_a_checkpoint_gives_its_weights(
    corpus: Path, tmp_path: Path, hub_cache: HubCache, form: str, kind: str
) -> None:
    """From a folder, and by name from the cache of the hub."""
    model, named = _model(kind), hub_cache("some/encoder")
    SAVED[form](model, named)
    shutil.copytree(corpus / "tokenizer", named, dirs_exist_ok=True)
    if form.startswith("sharded"):
        assert len([*named.glob("*-of-*")]) > 1
    shutil.copytree(named, tmp_path / "folder", symlinks=False)
    for init in ("some/encoder", str(tmp_path / "folder")):
        shape = Model(init=init, universal_layer=1)
        check_fit(shape, corpus / "tokenizer", 128)
        with pytest.raises(UserError, match="129 tokens, the model 128 positions"):
            check_fit(shape, corpus / "tokenizer", 129)
        found = build_model(shape, VOCABULARY, seed=1).lm.state_dict()
        for name, value in model.state_dict().items():
            expected = value.half().float() if form == "bin" else value
            assert torch.equal(found[name][: len(value)], expected), name
            assert not found[name][len(value) :].any()


def test_a_missing_head_starts_at_random_and_a_missing_layer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body: XLMRobertaModel = _model().base_model
    body.save_pretrained(tmp_path / "body")
    found = build_model(Model(init=str(tmp_path / "body"), universal_layer=1), VOCABULARY, seed=1).lm
    assert torch.equal(found.base_model.encoder.layer[1].output.dense.weight, body.encoder.layer[1].output.dense.weight)
    assert "lm_head.dense.weight" in capsys.readouterr().out
    weights = {name: value for name, value in _model().state_dict().items() if "layer.1" not in name}
    body.config.save_pretrained(tmp_path / "part")
    torch.save(weights, tmp_path / "part" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lacks 16 weights of its encoder, such as roberta.encoder.layer.1"):
        build_model(Model(init=str(tmp_path / "part"), universal_layer=1), VOCABULARY, seed=1)


def test_what_is_no_model_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a model folder nor a name that the hub gives"):
        init_config("nobody/nothing")
    with pytest.raises(UserError, match=r"no config.json"):
        init_config(str(tmp_path))
    _model().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        init_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"deberta-v2: it computes attention outside"):
        init_config(str(tmp_path))


def _train(rank: int, world: int, recipe: Recipe) -> float:
    start_ranks()
    state = build(agreed_inputs(recipe))
    fit(state, None)
    return state.engine.gradient_norm


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("xlm-roberta-xl", "zero3_bf16"),
        ("bert", "zero1_fp32"),
        ("modernbert", "zero1_bf16"),
        ("modernbert", "zero3_fp32"),
        ("mmbert", "zero1_fp32"),
    ],
)
def test_other_families_train_and_come_back_as_transformers_models(
    corpus: Path, tmp_path: Path, kind: str, config: str
) -> None:
    """BERT and ModernBERT with a BERT tokenizer, and mmBERT (a ModernBERT with Gemma's kind of tokenizer): special
    tokens have other ids and places."""
    init, special = tmp_path / "init", {"bos": 0, "pad": 1, "eos": 2}
    if kind != "xlm-roberta-xl":
        special = {"bos": 2, "pad": 0, "eos": 1 if kind == "mmbert" else 3}
        letters = {chr(c) for c in range(33, 0x500)} | set("".join(SAMPLE))
        own = _gemma_tokenizer(sorted(letters)) if kind == "mmbert" else _bert_tokenizer(sorted(letters))
        own.save_pretrained(tmp_path / "own" / "tokenizer")
        kind = kind.replace("mmbert", "modernbert")
        source = {"name": "nway.rows", "kind": "nway", "format": "jsonl", "path": "../rows.jsonl", "mono": True}
        shutil.copy(corpus.parent / "rows.jsonl", tmp_path)
        languages = ["en", "de", "ru"]
        prepared = prepare(tmp_path / "made", tmp_path / "own", [source], languages=languages, max_tokens=48)
        corpus = prepared.tokenizer.parent
        assert prepared.manifest.tokenizer.separators == 1
    _model(kind, **special).save_pretrained(init)
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(init)
    engine = f"engine={ROOT / 'ds_configs' / config}.json"
    overrides = (engine, f"model.init={init}", "optimizer.steps=3", "contrast.queue.size=30")
    recipe = small_recipe(corpus, tmp_path / "run", *overrides)
    assert all(norm > 0 for norm in run_ranks(_train, 2, recipe))
    export(tmp_path / "run", tmp_path / "out")
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert exported.config.model_type == kind
    before, after = AutoModelForMaskedLM.from_pretrained(init).state_dict(), exported.state_dict()
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in after.items()}
    assert _moved(before, after) > 0
    vectors = SentenceEmbedder(tmp_path / "out", layers="all").embed(SAMPLE)
    assert vectors.shape == (3, len(SAMPLE), 32) and np.isfinite(vectors).all()
    _expect_hidden_states(tmp_path / "out", vectors)


def _bert_tokenizer(letters: list[str]) -> BertTokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters[: (VOCABULARY - 5) // 2]]
    pieces += [f"##{piece}" for piece in pieces[5:]]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def _gemma_tokenizer(letters: list[str]) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, "\u2581", *letters[: VOCABULARY - 6]]
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.normalizer = Replace(" ", "\u2581")
    ids = [(name, special.index(name)) for name in ("<bos>", "<eos>")]
    tokenizer.post_processor = TemplateProcessing("<bos> $A <eos>", "<bos> $A <eos> $B <eos>", ids)
    names = {"cls_token": "<bos>", "sep_token": "<eos>", "bos_token": "<bos>", "eos_token": "<eos>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def _expect_hidden_states(folder: Path, vectors: np.ndarray) -> None:
    """The embedder's vectors are the normalised means of transformers' hidden states, for each sentence."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for n, sentence in enumerate(SAMPLE):
        with torch.no_grad():
            states = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            expected = torch.nn.functional.normalize(state[0].mean(0), dim=0).numpy()
            np.testing.assert_allclose(vectors[layer, n], expected, atol=1e-5)
