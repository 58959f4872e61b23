"""transformers alone loads an exported run, and the hidden states are those that were trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, XLMRobertaForMaskedLM

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.engine.engine import start_ranks
from infoxlm_ds.publish.export import SAMPLE, export
from infoxlm_ds.trainer import fit
from tests.corpus import small_recipe
from tests.distributed.masters import whole_masters
from tests.distributed.ranks import run_ranks


def _train(rank: int, world: int, recipe: Recipe) -> list[torch.Tensor]:
    """Train. Returns the hidden states of SAMPLE: transformers' own padded forward with the fp32 master weights."""
    start_ranks()
    state = build(agreed_inputs(recipe))
    fit(state, None)
    trained = state.objective.model.lm
    lm = XLMRobertaForMaskedLM(copy.deepcopy(trained.config)).eval()
    lm.set_attn_implementation("sdpa")
    masters = whole_masters(state.engine, list(trained.parameters()))
    for parameter, master in zip(lm.parameters(), masters, strict=True):
        parameter.data.copy_(master[: len(parameter)])  # without the rows that pad the vocabulary
    padded = AutoTokenizer.from_pretrained(recipe.corpus / "tokenizer")(SAMPLE, padding=True, return_tensors="pt")
    with torch.no_grad():
        return list(lm(**padded, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("config", ["zero0_fp32", "zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_fp32", "zero3_bf16"])
def test_the_exported_folder_gives_the_trained_hidden_states(corpus: Path, tmp_path: Path, config: str) -> None:
    engine = Path(__file__).parents[2] / "ds_configs" / f"{config}.json"
    overrides = ("optimizer.steps=2", "model.projection=true", "contrast.learn_temperature_within=[0.05, 0.2]")
    recipe = small_recipe(corpus, tmp_path / "run", f"engine={engine}", *overrides)
    trained = run_ranks(_train, 2, recipe)[0]
    export(tmp_path / "run", tmp_path / "out")
    model, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    padded = tokenizer(SAMPLE, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**padded, output_hidden_states=True).hidden_states
    for state, expected in zip(states, trained, strict=True):
        torch.testing.assert_close(state, expected, atol=0, rtol=0)
    assert model.config.universal_layer == recipe.model.universal_layer
    assert model.config.sentence_pooling == "mean"
    assert (tmp_path / "out" / "projection.safetensors").is_file()


def test_no_checkpoint_and_an_existing_folder_are_the_users_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        export(tmp_path, tmp_path / "out")
