"""transformers alone loads an exported run, and the hidden states are those that were trained."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, XLMRobertaForMaskedLM, pipeline

from infoxlm_ds.build import agreed_inputs, build, check_inputs
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.engine.engine import start_ranks
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.checksums import check_checksums
from infoxlm_ds.publish.export import export
from infoxlm_ds.publish.trained import SAMPLE
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
    padded = AutoTokenizer.from_pretrained(Path(recipe.corpus) / "tokenizer")(SAMPLE, padding=True, return_tensors="pt")
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


@pytest.fixture(scope="module")
def exported(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its export beside it."""
    run = tmp_path_factory.mktemp("exported") / "run"
    run_ranks(_train, 1, small_recipe(corpus, run, "optimizer.steps=2"))
    export(run, run.parent / "out")
    return run.parent / "out"


def test_a_run_without_its_model_folder_is_told_what_to_do(exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(exported.parent / "run", tmp_path / "run"))
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="is missing: train once more"):
        export(run, tmp_path / "out")


def test_a_text_that_is_too_long_is_cut_and_does_not_crash(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.model_max_length == 128
    long = "one two three four five " * 200
    assert len(tokenizer(long, truncation=True)["input_ids"]) == 128
    settings = {"model": str(exported), "tokenizer": tokenizer}
    features = pipeline("feature-extraction", tokenize_kwargs={"truncation": True}, **settings)(long)
    assert len(features[0]) == 128
    masked = pipeline("fill-mask", tokenizer_kwargs={"truncation": True}, **settings)
    assert len(masked(f"{tokenizer.mask_token} {long}")) == 5


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_export_is_refused(exported: Path, corpus: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} differs from what was written: .*checksums\.json"):
        SentenceEmbedder(folder)
    with pytest.raises(UserError, match=rf"{name} differs from what was written"):
        check_inputs(small_recipe(corpus, tmp_path / "run", f"model.init={folder}"), 0, 1)
    (folder / name).unlink()
    with pytest.raises(UserError, match="is missing"):
        check_checksums(folder, "")


def test_a_damaged_model_folder_of_a_run_is_named_and_mended(exported: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported.parent / "run", run)
    (run / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json differs from what was written: train once more"):
        export(run, tmp_path / "out")
    run_ranks(_start, 1, small_recipe(corpus, run, "optimizer.steps=3", "resume.allow_change=[optimizer]"))
    export(run, tmp_path / "out")


def _start(rank: int, world: int, recipe: Recipe) -> None:
    start_ranks()
    build(agreed_inputs(recipe)).loader.close()
