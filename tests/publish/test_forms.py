"""Each form of an export gives the sentence vectors of transformers' own hidden states, in its own library."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.model.sentence_vector import SentenceVector
from infoxlm_ds.publish.hugging_face import ENCODER, check_hugging_face, write_hugging_face
from infoxlm_ds.publish.sentence_transformers import check_sentence_transformers, write_sentence_transformers
from infoxlm_ds.publish.trained import Trained, require
from tests.publish.models import POSITIONS, random_model

TEXTS = ["The lamp is on.", "", "Лампа включена.", "Küche \U0001f600 क्षि 文の意味", "x", "The door, please. " * 60]
VECTORS = [
    SentenceVector(2, "mean", projected=True),
    SentenceVector(2, "cls", projected=True),
    SentenceVector(2, "mean"),
    SentenceVector(0, "mean"),
    SentenceVector(3, "cls"),
]


def _oracle(trained: Trained) -> Vectors:
    """The vectors [n, D] of TEXTS from transformers' padded forward pass of the whole model, in one batch."""
    lm = copy.deepcopy(trained.model.lm)
    lm.set_attn_implementation("eager")
    inputs = trained.tokenizer(TEXTS, padding=True, truncation=True, max_length=POSITIONS, return_tensors="pt")
    with torch.no_grad():
        states = lm(**inputs, output_hidden_states=True).hidden_states[trained.vector.layer]
        mask = inputs["attention_mask"][:, :, None]
        vectors = states[:, 0] if trained.vector.pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
        if trained.vector.projected:
            assert trained.projection is not None
            vectors = torch.nn.functional.linear(vectors, trained.projection)
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


@contextmanager
def _no_warning(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if the block warns, through Python or through a log."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield
    transformers_logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("vector", VECTORS, ids=str)
@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert", "xlm-roberta-xl", "bert"])
def test_sentence_transformers_gives_our_vectors(
    family: str, vector: SentenceVector, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    trained = random_model(family, model_folder, vector)
    write_sentence_transformers(trained, tmp_path)
    assert "vectors equal" in check_sentence_transformers(trained, tmp_path)
    with _no_warning(caplog):
        model = library.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=4), _oracle(trained), atol=1e-5)
    assert (model.max_seq_length, model.similarity_fn_name) == (POSITIONS, "cosine")
    assert not any(model.prompts.values()) and model.default_prompt_name is None
    kept = json.loads((tmp_path / "0_Transformer" / "config.json").read_text())["num_hidden_layers"]
    assert kept == min(3, vector.layer + (family in ("modernbert", "xlm-roberta-xl")))


@pytest.mark.parametrize("vector", VECTORS[:3], ids=str)
@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert"])
def test_transformers_loads_both_models_without_a_warning(
    family: str, vector: SentenceVector, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = random_model(family, model_folder, vector)
    trained.tokenizer.save_pretrained(tmp_path)
    write_hugging_face(trained, tmp_path)
    assert "vectors to" in check_hugging_face(trained, tmp_path)
    places = ((AutoModelForMaskedLM, tmp_path), (AutoModel, tmp_path / ENCODER))
    for kind, folder in places:
        with _no_warning(caplog):
            model, report = kind.from_pretrained(folder, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt"))
        assert not any(report.values()), report
        assert tokenizer.model_max_length == POSITIONS and model.config.universal_layer == 2
        embedder = SentenceEmbedder(folder, device="cpu")
        np.testing.assert_allclose(embedder.embed(TEXTS)[0], _oracle(trained), atol=1e-5)
        assert embedder.projected is vector.projected


def test_another_layer_or_pooling_of_a_folder_has_no_projection(model_folder: Path, tmp_path: Path) -> None:
    trained = random_model("xlm-roberta", model_folder, VECTORS[0])
    trained.tokenizer.save_pretrained(tmp_path)
    write_hugging_face(trained, tmp_path)
    plain = random_model("xlm-roberta", model_folder, VECTORS[2])
    for embedder in (SentenceEmbedder(tmp_path, 2), SentenceEmbedder(tmp_path, pooling="mean")):
        np.testing.assert_allclose(embedder.embed(TEXTS)[0], _oracle(plain), atol=1e-5)
        assert not embedder.projected


@pytest.mark.parametrize(
    ("family", "vector"), [("xlm-roberta", VECTORS[0]), ("modernbert", VECTORS[1]), ("bert", VECTORS[4])], ids=str
)
def test_onnx_gives_our_vectors_for_every_shape(
    family: str, vector: SentenceVector, model_folder: Path, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from infoxlm_ds.publish.onnx import check_onnx, embed_onnx, open_session, write_onnx

    trained = random_model(family, model_folder, vector)
    write_onnx(trained, tmp_path)
    found = check_onnx(trained, tmp_path)
    assert "int8: mean cosine 0.9" in found and "accuracy not measured" in found
    session, expected = open_session(tmp_path / "onnx" / "model.onnx"), _oracle(trained)
    assert [(one.name, one.shape) for one in session.get_inputs()] == [
        ("input_ids", ["batch", "length"]),
        ("attention_mask", ["batch", "length"]),
    ]
    np.testing.assert_allclose(embed_onnx(session, trained, TEXTS), expected, atol=1e-5)
    for text, one in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(embed_onnx(session, trained, [text])[0], one, atol=1e-5)


@pytest.mark.parametrize("found", [2e-5, float("nan")])
def test_a_copy_that_differs_is_not_exported(found: float, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="vectors differ by"):
        require(found, 1e-5, tmp_path, "vectors differ by {}")


def test_vectors_of_other_weights_are_found(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    trained = random_model("xlm-roberta", model_folder, VECTORS[0])
    write_sentence_transformers(trained, tmp_path)
    with torch.no_grad():
        assert trained.model.head.projection is not None
        trained.model.head.projection.weight[0] *= 1.01
    with pytest.raises(RuntimeError, match=r"vectors of sentence-transformers differ by .* from ours"):
        check_sentence_transformers(trained, tmp_path)
