"""Export for ONNX: one graph from token ids to normalised sentence vectors, in fp32 and in int8.

Legend: n texts, b texts of a batch, t tokens of its longest text, D width.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from infoxlm_ds.config import Pooling, UserError
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.evaluation.retrieval import pair_accuracy
from infoxlm_ds.evaluation.text import Pairs
from infoxlm_ds.monitor.probe import read_probe
from infoxlm_ds.publish.cut import Cut, cut_encoder
from infoxlm_ds.publish.trained import VECTORS, Trained, require

FOLDER, WHOLE, INT8 = "onnx", "model.onnx", "model_int8.onnx"
OPSET = 18
BATCH = 32  # texts
PAIRS = 200  # of a language, to measure int8


def require_onnx() -> None:
    """UserError if a package is missing."""
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise UserError(f"--as onnx needs {', '.join(missing)}: pip install 'infoxlm-ds[onnx]'")


class Sentences(nn.Module):
    """Token ids and mask, both [b, t] int64, to L2-normalised sentence vectors [b, D]."""

    def __init__(self, cut: Cut, pooling: Pooling, projection: Tensor | None) -> None:
        super().__init__()
        self.encoder, self.state, self.pooling = cut.model, cut.state, pooling
        self.register_buffer("projection", projection)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Padding is on the right, where mask is 0."""
        inner = self.state is not None
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=inner)
        states = out.hidden_states[self.state] if inner else out.last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        vectors = states[:, 0] if self.pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
        if self.projection is not None:
            vectors = vectors @ self.projection.T
        return normalize(vectors, dim=-1)


def write_onnx(trained: Trained, folder: Path) -> None:
    """Write both graphs. A model above 2 GB has its weights in a file beside its graph."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    (folder / FOLDER).mkdir()
    projection = trained.projection if trained.vector.projected else None
    module = Sentences(cut_encoder(trained.model.lm, trained.vector.layer), trained.vector.pooling, projection)
    whole = folder / FOLDER / WHOLE
    with _silence():
        _export(module.eval(), whole)
        quantize_dynamic(whole, folder / FOLDER / INT8, weight_type=QuantType.QInt8)


def _export(module: Sentences, path: Path) -> None:
    ids = torch.full((2, 7), 5)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        module,
        (ids, torch.ones_like(ids)),
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=(axes, axes),
        external_data=False,
        verbose=False,
    )


def check_onnx(trained: Trained, folder: Path) -> str:
    """Run both graphs. Returns what was found, with the loss in accuracy of int8; RuntimeError if the vectors of the
    fp32 graph differ from ours."""
    whole, int8 = (open_session(folder / FOLDER / name) for name in (WHOLE, INT8))
    vectors = embed_onnx(whole, trained, trained.texts)
    difference = trained.difference(vectors)
    require(difference, VECTORS, folder, "vectors of ONNX differ by {} from ours")
    cosine = float((vectors * embed_onnx(int8, trained, trained.texts)).sum(1).mean())
    return f"vectors equal to {difference:.1e}; int8: mean cosine {cosine:.4f} to fp32, {_loss(trained, whole, int8)}"


def _loss(trained: Trained, whole: Any, int8: Any) -> str:
    """What int8 costs in retrieval accuracy on the data of the run's probe."""
    probe = trained.recipe.probe
    if probe is None:
        return "accuracy not measured (the run has no probe)"
    if not probe.data.is_file():
        return f"accuracy not measured ({probe.data} is not there)"
    pairs = [of_language.first(PAIRS) for of_language in read_probe(probe)]
    before, after = (np.mean([_accuracy(session, trained, p) for p in pairs]) for session in (whole, int8))
    return f"accuracy@1 {after:.3f} in place of {before:.3f} (probe data, {len(pairs)} languages)"


def _accuracy(session: Any, trained: Trained, pairs: Pairs) -> float:
    """The mean of both directions."""
    pivot, other = (embed_onnx(session, trained, texts) for texts in (pairs.pivot_text, pairs.text))
    return pair_accuracy(pivot, other, pairs)


def open_session(path: Path) -> Any:
    """A session of onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def embed_onnx(session: Any, trained: Trained, texts: Sequence[str]) -> Vectors:
    """The vectors [n, D] of texts, in batches of texts of nearly equal length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(texts), BATCH):
        batch = [texts[i] for i in order[start : start + BATCH]]
        padded = trained.tokenizer(batch, padding=True, truncation=True, max_length=trained.positions)
        inputs = {name: np.array(padded[name], np.int64) for name in ("input_ids", "attention_mask")}
        parts.append(session.run(None, inputs)[0])
    vectors: Vectors = np.concatenate(parts)[np.argsort(order)]
    return vectors


@contextlib.contextmanager
def _silence() -> Any:
    """The exporters print and warn of their own doings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
