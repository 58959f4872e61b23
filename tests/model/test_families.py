"""Every family of encoders gives the same on a flat batch as transformers on padded batches. Models that cannot run on
a flat batch are refused."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel

from infoxlm_ds.config import Model, Pooling, UserError
from infoxlm_ds.data.flat_batch import flat_batch, make_layout
from infoxlm_ds.model.attention import FLAT_ATTENTION
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.families import FAMILIES, family_of, positions_of
from infoxlm_ds.model.heads import masked_lm_losses
from infoxlm_ds.model.pretrained import assemble, pad_vocabulary, shape_of

PAD, VOCABULARY = 1, 300


def _shape(family: str, universal_layer: int = 2) -> Model:
    tree = {"layers": 4, "width": 48, "heads": 4, "feed_forward": 96, "positions": 64, "projection": False}
    shape = Model.model_validate(tree | {"universal_layer": universal_layer, "pooling": "mean"})
    return shape.model_copy(update={"type": family})  # a recipe makes fewer families than it can load


def _padded(family: str) -> PreTrainedModel:
    """transformers' own model, with every weight moved off its initial value."""
    config = shape_of(_shape(family), VOCABULARY)
    if family == "modernbert":
        config.local_attention = 16  # shorter than the sequences, so that the window matters
    torch.manual_seed(3)
    lm = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").train(False)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return lm


def _flat_twin(lm: PreTrainedModel, universal_layer: int, pooling: Pooling = "mean") -> InfoXLM:
    twin = copy.deepcopy(lm)
    twin.set_attn_implementation(FLAT_ATTENTION)
    shape = _shape(lm.config.model_type, universal_layer)
    return assemble(pad_vocabulary(twin), shape.model_copy(update={"pooling": pooling}))


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids [S, L], attention mask, and labels (-100 where not masked)."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(3, 64, size=9)
    ids = torch.full((9, int(lengths.max())), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(generator.integers(4, VOCABULARY, size=length))
    chosen = (torch.from_numpy(generator.random(ids.shape)) < 0.2) & (ids != PAD)
    return ids, ids != PAD, torch.where(chosen, ids, -100)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_transformers_on_padded_batches(family: str) -> None:
    lm, (ids, mask, labels) = _padded(family), _batch()
    model = _flat_twin(lm, universal_layer=2)
    expected = lm(input_ids=ids, attention_mask=mask, labels=labels)
    expected.loss.backward()
    tokens = flat_batch(ids[mask].numpy(), mask.sum(1).numpy())
    (rows,) = torch.nonzero(labels[mask] >= 0, as_tuple=True)
    states, _ = model(tokens, tokens.layout, make_layout(np.zeros(0, np.int64)), rows)
    weights = torch.full((len(rows),), 1 / len(rows))
    weighted, _ = masked_lm_losses(model.lm, states, labels[mask][rows], weights)
    loss = weighted.sum()
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    ours = dict(model.lm.named_parameters())
    for name, parameter in lm.named_parameters():
        if name.endswith("attention.self.key.bias"):  # mathematically zero: noise
            continue
        assert parameter.grad is not None and ours[name].grad is not None
        largest = float(parameter.grad.abs().max())
        found, padding = ours[name].grad[: len(parameter)], ours[name].grad[len(parameter) :]
        torch.testing.assert_close(found, parameter.grad, atol=2e-5 * largest, rtol=1e-5, msg=name)
        assert not padding.any()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("universal_layer", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_representations_come_from_the_hidden_state_of_that_number(
    family: str, universal_layer: int, pooling: Pooling
) -> None:
    """In the joint pass, and in the part of the encoder that the contrast trains. The numbers are those of
    transformers, whose last state has gone through the final norm."""
    lm, (ids, mask, _) = _padded(family), _batch()
    model, lengths = _flat_twin(lm, universal_layer, pooling), mask.sum(1).numpy()
    with torch.no_grad():
        states = lm(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        tokens, trunk = flat_batch(ids[mask].numpy(), lengths), make_layout(lengths[:5])
        queries = flat_batch(ids[5:][mask[5:]].numpy(), lengths[5:])
        rows = torch.arange(3, trunk.tokens, 4)
        masked, reps = model(tokens, trunk, queries.layout, rows)
        alone = model.sentence_encoder()(queries)
    torch.testing.assert_close(masked, states[-1][:5][mask[:5]][rows], atol=2e-5, rtol=0)
    read = [s[:n] for s, n in zip(states[universal_layer][5:], lengths[5:], strict=True)]
    expected = torch.stack([s[0] if pooling == "cls" else s.mean(0) for s in read])
    torch.testing.assert_close(reps, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(alone, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sequence_that_a_family_takes(family: str) -> None:
    lm = _padded(family)
    assert positions_of(lm.config) == 64
    ids = torch.full((1, 64), 7)
    assert torch.isfinite(lm(input_ids=ids).logits).all()
    if not FAMILIES[family].rotary:
        with pytest.raises((IndexError, RuntimeError)):
            lm(input_ids=torch.full((1, 65), 7))


def test_what_cannot_run_on_a_flat_batch_is_refused_with_its_reason(tmp_path: Path) -> None:
    cases = {
        "deberta-v2": "outside transformers' attention interface",
        "gpt2": "no masked LM head",
        "electra": "families.py",
    }
    for kind, reason in cases.items():
        with pytest.raises(UserError, match=reason):
            family_of(AutoConfig.for_model(kind), "model.init x")
    with pytest.raises(UserError, match="is_decoder"):
        family_of(AutoConfig.for_model("bert", is_decoder=True))


def test_a_base_model_has_the_same_parts() -> None:
    """Evaluation reads a model without a masked LM head."""
    config = shape_of(_shape("modernbert"), VOCABULARY)
    assert family_of(AutoModel.from_config(config).config) is FAMILIES["modernbert"]
