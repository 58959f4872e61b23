"""The encoder is XLM-R: the joint pass on a flat batch equals XLMRobertaForMaskedLM on padded batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import XLMRobertaForMaskedLM

from infoxlm_ds.config import Model
from infoxlm_ds.data.flat_batch import flat_batch, make_layout
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.heads import masked_lm_losses, pool
from infoxlm_ds.model.pretrained import build_model

PAD, VOCABULARY = 1, 300
NOTHING = make_layout(np.zeros(0, np.int64))
SHAPE = Model(layers=3, width=48, heads=4, feed_forward=96, positions=64, universal_layer=2)


def _noisy_model(seed: int) -> InfoXLM:
    """A model with random weights. Every tensor is moved, so that none is zero or one by initialisation."""
    model = build_model(SHAPE, VOCABULARY, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _padded_twin(model: InfoXLM) -> XLMRobertaForMaskedLM:
    twin = XLMRobertaForMaskedLM(
        model.lm.config.__class__(**model.lm.config.to_dict() | {"attn_implementation": "sdpa"})
    )
    padded = -(-VOCABULARY // 64) * 64  # rows of the model's vocabulary matrices
    assert len(model.lm.get_input_embeddings().weight) == padded > VOCABULARY
    weights = model.lm.state_dict()
    twin.load_state_dict({name: w[:VOCABULARY] if len(w) == padded else w for name, w in weights.items()})
    twin.set_attn_implementation("sdpa")
    return twin.train(False)


def _batch(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids [S, L], attention mask and labels (-100 where not masked)."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 60, size=count)
    ids = torch.full((count, int(lengths.max())), PAD)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(generator.integers(4, VOCABULARY, size=length))
        chosen = torch.from_numpy(generator.random(length) < 0.2)
        labels[row, :length][chosen] = ids[row, :length][chosen]
    return ids, ids != PAD, labels


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_masked_lm_on_a_flat_batch_equals_transformers_on_padded_batches(seed: int) -> None:
    model, (ids, mask, labels) = _noisy_model(seed), _batch(seed, 7)
    twin = _padded_twin(model)
    out = twin(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    out.loss.backward()

    tokens = flat_batch(ids[mask].numpy(), mask.sum(1).numpy())
    (rows,) = torch.nonzero(labels[mask] >= 0, as_tuple=True)
    states, leaving = model(tokens, tokens.layout, NOTHING, rows)
    assert leaving.shape == (0, SHAPE.width)
    weights = torch.full((len(rows),), 1 / len(rows))
    weighted, each = masked_lm_losses(model.lm, states, labels[mask][rows], weights)
    loss = weighted.sum()
    loss.backward()

    torch.testing.assert_close(loss, out.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(each.mean(), out.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(states, out.hidden_states[-1][mask][rows], atol=1e-5, rtol=0)
    ours, theirs = dict(model.lm.named_parameters()), dict(twin.named_parameters())
    for name, parameter in theirs.items():
        if name.endswith("attention.self.key.bias"):  # mathematically zero: noise
            continue
        assert parameter.grad is not None and ours[name].grad is not None
        largest = float(parameter.grad.abs().max())
        found, padding = ours[name].grad[: len(parameter)], ours[name].grad[len(parameter) :]
        torch.testing.assert_close(found, parameter.grad, atol=1e-5 * largest, rtol=1e-5, msg=name)
        assert not padding.any()


def test_hidden_states_of_every_layer_equal_transformers() -> None:
    model, (ids, mask, _) = _noisy_model(4), _batch(4, 9)
    expected = _padded_twin(model)(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    tokens = flat_batch(ids[mask].numpy(), mask.sum(1).numpy())
    hidden = model.body.embed(tokens)
    for depth, states in enumerate(expected):
        torch.testing.assert_close(hidden, states[mask], atol=1e-5, rtol=0)
        hidden = model.body.run(hidden, tokens.layout, depth, depth + 1)


def test_queries_that_leave_early_get_the_same_states_and_leave_the_trunk_alone() -> None:
    model, (ids, mask, _) = _noisy_model(5), _batch(5, 8)
    model.head.pooling, model.head.projection, model.head.normalized = "mean", None, False
    lengths = mask.sum(1).numpy()
    tokens, trunk = flat_batch(ids[mask].numpy(), lengths), flat_batch(ids[:5][mask[:5]].numpy(), lengths[:5])
    rows = torch.tensor([3, 4, 11])
    states, reps = model(tokens, trunk.layout, make_layout(lengths[5:]), rows)
    alone, _ = model(trunk, trunk.layout, NOTHING, rows)
    torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)
    inner = _padded_twin(model)(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    expected = torch.stack([row[:n].mean(0) for row, n in zip(inner[5:], lengths[5:], strict=True)])
    torch.testing.assert_close(reps, expected, atol=1e-5, rtol=0)
    encoder = model.sentence_encoder()
    torch.testing.assert_close(encoder(flat_batch(ids[5:][mask[5:]].numpy(), lengths[5:])), reps, atol=1e-5, rtol=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30))
def test_dense_groups_are_a_bijection_between_tokens_and_real_columns(lengths: list[int]) -> None:
    dense = make_layout(np.array(lengths, dtype=np.int64)).dense
    assert dense is not None
    torch.testing.assert_close(dense.gather[dense.scatter], torch.arange(sum(lengths)))
    real = sum(int(g.mask.sum()) if g.mask is not None else g.stop - g.start for g in dense.groups)
    assert real == sum(lengths)
    assert all(group.stop - group.start <= 1.15 * sum(lengths) for group in dense.groups)


def test_cls_and_mean_pooling_of_a_flat_batch() -> None:
    hidden, layout = torch.randn(9, 4), make_layout(np.array([2, 4, 3]))
    parts = hidden.split([2, 4, 3])
    torch.testing.assert_close(pool(hidden, layout, "cls"), torch.stack([p[0] for p in parts]))
    torch.testing.assert_close(pool(hidden, layout, "mean"), torch.stack([p.mean(0) for p in parts]))
