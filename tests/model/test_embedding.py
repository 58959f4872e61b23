"""Word embeddings that share their matrix with the masked LM head get one gradient, in one buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infoxlm_ds.config import Model
from infoxlm_ds.data.flat_batch import flat_batch, make_layout
from infoxlm_ds.model.embedding import TiedEmbedding
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.heads import masked_lm_losses
from infoxlm_ds.model.pretrained import build_model

VOCABULARY = 100


def _model() -> InfoXLM:
    tree = {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64, "positions": 64, "universal_layer": 1}
    return build_model(Model.model_validate(tree | {"pooling": "cls"}), VOCABULARY, 1)


def _pass(model: InfoXLM, masked: int, trunk: int) -> None:
    """A backward pass of a batch of which `trunk` sequences are the trunk and the others are queries."""
    lengths = np.array([9, 7, 5, 6])
    tokens = flat_batch(np.arange(lengths.sum()) % 20 + 5, lengths)  # some ids come twice
    rows = torch.arange(masked)
    states, vectors = model(tokens, make_layout(lengths[:trunk]), make_layout(lengths[trunk:]), rows)
    weighted, _ = masked_lm_losses(model.lm, states, rows + 7, torch.full((masked,), 0.3))
    (weighted.sum() + vectors.square().sum()).backward()


def test_gradients_of_several_passes_are_those_of_plain_embeddings() -> None:
    tied, plain = _model(), _model()
    words = tied.lm.get_input_embeddings()
    assert isinstance(words, TiedEmbedding) and words.weight is tied.lm.get_output_embeddings().weight
    usual = nn.Embedding(*words.weight.shape)
    usual.weight = plain.lm.get_input_embeddings().weight
    plain.lm.set_input_embeddings(usual)
    for masked, trunk in ((6, 2), (0, 2), (0, 0), (3, 4)):  # masked words, none, no trunk, no queries
        for model in (tied, plain):
            _pass(model, masked, trunk)
        assert words.take() is None
    for (name, p), q in zip(tied.named_parameters(), plain.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_gradient_of_the_head_becomes_that_of_the_matrix_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, places = _model(), []
    collect = TiedEmbedding.collect

    def noted(words: TiedEmbedding, gradient: Tensor) -> None:
        places.append(gradient.data_ptr())
        collect(words, gradient)

    monkeypatch.setattr(TiedEmbedding, "collect", noted)
    _pass(model, 6, 2)
    gradient = model.lm.get_input_embeddings().weight.grad
    assert gradient is not None and places == [gradient.data_ptr()]


def test_in_16_bits_autograd_adds_the_gradients() -> None:
    words = _model().bfloat16().lm.get_input_embeddings()
    assert isinstance(words, TiedEmbedding) and not words.collects


def test_a_head_without_its_embeddings_is_noticed() -> None:
    words = _model().lm.get_input_embeddings()
    words.collect(torch.zeros(1))
    with pytest.raises(AssertionError, match="did not reach the embeddings"):
        words.collect(torch.zeros(1))
