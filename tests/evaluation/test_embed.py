"""Sentence vectors equal those from Hugging Face's own hidden states."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from infoxlm_ds.config import Pooling, UserError
from infoxlm_ds.evaluation import embed as module
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from tests.evaluation.tiny_xlmr import SENTENCES


def _oracle(folder: Path, sentences: list[str], pooling: Pooling) -> npt.NDArray[np.float32]:
    """[L, n, D] from `output_hidden_states`. One sentence at a time, so there is no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    vectors = []
    for sentence in sentences:
        inputs = tokenizer(sentence, truncation=True, max_length=34, return_tensors="pt")
        with torch.no_grad():
            layers = torch.cat(model(**inputs, output_hidden_states=True).hidden_states)
        vectors.append(layers[:, 0] if pooling == "cls" else layers.mean(1))
    return torch.nn.functional.normalize(torch.stack(vectors, dim=1), dim=-1).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_layer_equals_hugging_face_hidden_states(model_folder: Path, pooling: Pooling) -> None:
    vectors = SentenceEmbedder(model_folder, "all", pooling).embed(SENTENCES)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, _oracle(model_folder, SENTENCES, pooling), atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_one_layer_alone_is_that_layer_of_all(model_folder: Path, layer: int) -> None:
    alone = SentenceEmbedder(model_folder, layer).embed(SENTENCES)
    np.testing.assert_array_equal(alone[0], SentenceEmbedder(model_folder, "all").embed(SENTENCES)[layer])


def test_vectors_do_not_depend_on_batch_size_or_order(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = SentenceEmbedder(model_folder, "all")
    vectors = embedder.embed(SENTENCES)
    for batch_size in (1, 2, 7):
        monkeypatch.setattr(module, "BATCH", batch_size)
        np.testing.assert_allclose(embedder.embed(SENTENCES), vectors, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(SENTENCES[::-1]), vectors[:, ::-1], atol=1e-6)


def test_long_sentences_are_cut_to_the_model_and_counted(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = " ".join(SENTENCES)
    vectors = SentenceEmbedder(model_folder, "all").embed([long, SENTENCES[0]])
    np.testing.assert_allclose(vectors, _oracle(model_folder, [long, SENTENCES[0]], "mean"), atol=1e-5)
    assert "1 of 2 sentences have more than 34 tokens" in caplog.text


def test_layer_and_pooling_default_to_the_config(model_folder: Path, tmp_path: Path) -> None:
    folder = _copy(model_folder, tmp_path, sentence_pooling="cls")
    embedder = SentenceEmbedder(folder)
    assert embedder.views == [(2, "cls")]
    folder = _copy(model_folder, tmp_path, universal_layer=None)
    config = json.loads((folder / "config.json").read_text())
    del config["universal_layer"]
    (folder / "config.json").write_text(json.dumps(config))
    assert SentenceEmbedder(folder).views == [(3, "mean")]


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_out_of_range_is_the_users_mistake(model_folder: Path, layer: int) -> None:
    with pytest.raises(UserError, match=r"0 \(embeddings\) to 3"):
        SentenceEmbedder(model_folder, layer)


def test_a_folder_without_model_tokenizer_or_weights_is_the_users_mistake(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        SentenceEmbedder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        SentenceEmbedder(tmp_path)
    for missing in ("model.safetensors", "tokenizer.json"):
        folder = _copy(model_folder, tmp_path)
        (folder / missing).unlink()
        with pytest.raises(UserError, match=str(folder)):
            SentenceEmbedder(folder)


def test_a_model_is_never_filled_up_with_random_weights(model_folder: Path, tmp_path: Path) -> None:
    folder = _copy(model_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["roberta.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights.*layer\.1\.output\.dense\.weight"):
        SentenceEmbedder(folder)


def _copy(model_folder: Path, tmp_path: Path, **config_changes: object) -> Path:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | config_changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder
