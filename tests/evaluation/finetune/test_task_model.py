"""A head on flat batches gives what transformers' own model gives on padded batches."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from infoxlm_ds.config import Model, UserError
from infoxlm_ds.data.flat_batch import flat_batch
from infoxlm_ds.evaluation.finetune.items import NONE
from infoxlm_ds.evaluation.finetune.packing import Batch
from infoxlm_ds.evaluation.finetune.task_model import CLASSES, TaskModel, load_task_model
from infoxlm_ds.evaluation.finetune.tasks import Kind
from infoxlm_ds.model.attention import FLAT_ATTENTION
from infoxlm_ds.model.pretrained import shape_of

PAD, VOCABULARY, LENGTHS = 1, 60, np.array([5, 3, 17, 16, 9])


def _batch() -> tuple[Tensor, Tensor]:
    """Padded ids [S, L] and attention mask."""
    generator = np.random.default_rng(5)
    ids = torch.full((len(LENGTHS), int(LENGTHS.max())), PAD)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.from_numpy(generator.integers(4, VOCABULARY, size=length))
    return ids, ids != PAD


def _labels(kind: Kind, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same labels as transformers takes them, and as ours do."""
    generator = torch.Generator().manual_seed(1)
    if kind == "pair":
        labels = torch.randint(3, (len(LENGTHS),), generator=generator)
        return {"labels": labels}, labels
    if kind == "span":
        labels = torch.tensor([[1, 2], [0, 0], [16, 16], [3, 15], [2, 8]])
        return {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}, labels.flatten()
    labels = torch.randint(3, mask.shape, generator=generator).masked_fill(~mask, NONE)
    labels[0, :2] = NONE
    return {"labels": labels}, labels[mask]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl", "bert"])
def test_losses_logits_and_gradients_equal_transformers_on_padded_batches(family: str, kind: Kind) -> None:
    tree = {"layers": 2, "width": 16, "heads": 2, "feed_forward": 32, "positions": 20, "universal_layer": 1}
    shape = Model.model_validate(tree | {"projection": False}).model_copy(update={"type": family})
    config = shape_of(shape, VOCABULARY)
    config.num_labels = 2 if kind == "span" else 3
    torch.manual_seed(3)
    theirs = CLASSES[kind].from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    twin = copy.deepcopy(theirs)
    twin.set_attn_implementation(FLAT_ATTENTION)
    ours = TaskModel(twin, kind)
    ids, mask = _batch()
    named, labels = _labels(kind, mask)
    out = theirs(input_ids=ids, attention_mask=mask, **named)
    logits = torch.stack([out.start_logits, out.end_logits], -1) if kind == "span" else out.logits
    flat = flat_batch(ids[mask].numpy(), LENGTHS)
    torch.testing.assert_close(ours.logits(flat), logits if kind == "pair" else logits[mask], atol=1e-5, rtol=0)
    loss, expected = ours(Batch(flat, labels)), out.loss
    if kind == "span":  # their softmax runs over padding too, so each sequence is asked alone
        rows = [(ids[i : i + 1, :n], {name: x[i : i + 1] for name, x in named.items()}) for i, n in enumerate(LENGTHS)]
        expected = torch.stack([theirs(input_ids=row, **given).loss for row, given in rows]).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    expected.backward()
    found = dict(twin.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        atol = 2e-5 * float(parameter.grad.abs().max()) + 1e-7  # some are mathematically zero: noise
        torch.testing.assert_close(found[name].grad, parameter.grad, atol=atol, rtol=1e-5, msg=name)


def test_dropout_acts_in_attention_and_in_layers_in_training_only(model_folder: Path) -> None:
    model, _ = load_task_model(model_folder, "pair", ["a", "b"], 0.5, seed=1)
    flat = flat_batch(np.arange(4, 9), np.array([5]))
    attention = model.model.base_model.encoder.layer[0].attention.self
    assert attention.dropout.p == 0.5
    for other in (x for x in model.modules() if isinstance(x, torch.nn.Dropout) and x is not attention.dropout):
        other.p = 0.0
    assert not torch.equal(model.train().logits(flat), model.logits(flat))
    assert torch.equal(model.eval().logits(flat), model.logits(flat))


def test_a_new_head_depends_on_the_seed_alone(model_folder: Path) -> None:
    heads = [load_task_model(model_folder, "token", ["a", "b"], 0.1, seed)[0].model.classifier for seed in (1, 1, 2)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].bias is not None


def test_a_kind_of_model_without_a_head_here_is_refused(tmp_path: Path, model_folder: Path) -> None:

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ModernBertForMaskedLM(ModernBertConfig(vocab_size=len(tokenizer), pad_token_id=1, **small)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="is a modernbert, which cannot be fine-tuned here"):
        load_task_model(tmp_path, "pair", ["a", "b"], 0.1, seed=1)


def test_the_tokenizer_that_is_kept_gives_no_token_types(tmp_path: Path) -> None:
    """A BERT that got them would compute something else than what was trained."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=len(tokens), **small)).save_pretrained(tmp_path)
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path)("a", "b")
    _, tokenizer = load_task_model(tmp_path, "pair", ["a", "b"], 0.1, seed=1)
    tokenizer.save_pretrained(tmp_path / "kept")
    assert list(AutoTokenizer.from_pretrained(tmp_path / "kept")("a", "b")) == ["input_ids", "attention_mask"]
