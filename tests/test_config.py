"""A recipe is checked as a whole: every wrong key is named, and every shipped recipe loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForMaskedLM

from infoxlm_ds.config import UserError
from infoxlm_ds.engine.config import check_device, load_engine_config, stage_of
from infoxlm_ds.model.pretrained import shape_of
from infoxlm_ds.reading import load_recipe

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "demo.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    load_engine_config(recipe.engine)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_every_shipped_engine_config_loads(path: Path, fp16_on_cpu: None) -> None:
    load_engine_config(path)
    assert f"`{path.name}`" in (ROOT / "ds_configs" / "README.md").read_text()


def test_fp16_is_refused_where_deepspeed_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)  # some CPUs can
    with pytest.raises(UserError, match="fp16 on GPUs only"):
        check_device(load_engine_config(ROOT / "ds_configs" / "zero1_fp16.json"))


@pytest.mark.parametrize(("name", "millions"), [("base", 278.3), ("large", 560.1), ("xl", 3480)])
def test_shipped_recipes_have_the_sizes_of_xlm_r(name: str, millions: float) -> None:
    """The published sizes, without a sentence head."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", ["model.init=null"])
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(shape_of(recipe.model, 250002))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=5e-4)


def test_overrides_win_over_the_file_and_take_its_types() -> None:
    recipe = load_recipe(DEMO, ["optimizer.learning_rate=1e-4", "contrast.negatives=both", "sampling={}"])
    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.contrast.negatives == "both" and recipe.sampling.pivot is None


def test_a_preset_lies_below_the_recipe(tmp_path: Path) -> None:
    text = "preset: {}\nrun: r\ncorpus: c\nengine: e\nmodel: {{pooling: mean}}\ncontrast: {{temperature: 0.2}}\n"
    text += "batch: {{lanes: 1, mmlm_tokens: 1, tlm_tokens: 1, xlco_pairs: 200}}\n"
    text += "optimizer: {{learning_rate: 1.0, steps: 1000, warmup: 1}}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format("infoxlm"))
    recipe = load_recipe(path)
    assert (recipe.contrast.keys, recipe.contrast.negatives, recipe.contrast.symmetric) == ("momentum", "queue", False)
    assert recipe.contrast.mixup == "paper" and not recipe.model.normalize and recipe.model.pooling == "mean"
    strong = load_recipe(path, ["preset=strong", "contrast.negatives=both", "model.pooling=cls"])
    assert (strong.contrast.keys, strong.contrast.symmetric, strong.model.normalize) == ("gradient", True, True)
    assert strong.contrast.negatives == "both" and strong.model.pooling == "cls"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.stepz=3"], ["optimizer.stepz", "not a known key"]),
        (["sped=3", "batch.lanes=two"], ["sped", "batch.lanes"]),
        (["contrast.temperature=0"], ["contrast.temperature", "0.0001"]),
        (["contrast.negatives=queue"], ["gradient", "in_batch or both"]),
        (["sampling.pivot=null"], ["sampling", "pivot and pivot_share"]),
        (["model.universal_layer=99"], ["universal_layer 99", "model.layers"]),
        (["weights={mmlm: 0, tlm: 0, xlco: 0}"], ["no task is left"]),
        (["optimizer.steps"], ["key.path=value"]),
        (["contrast.learn_temperature_within=[0.1, 1]"], ["learn_temperature_within", "between"]),
        (["contrast.same_text=positive", "contrast.mixup=paper"], ["same_text: positive", "mixup: off"]),
        (["contrast.pairs_per_row=2"], ["pairs_per_row", "same_text: positive"]),
        (["contrast.queue.size=0"], ["contrast.queue.size", "greater than 0"]),
        (["preset=infoxml"], ["preset", "infoxlm"]),
        (["resume.allow_change=[optimiser]"], ["resume.allow_change", "optimiser is no key"]),
        (["resume.allow_change=[optimizer.rate]"], ["optimizer.rate is no key"]),
        (["seed.deep=1"], ["seed is a value"]),
        (["resume=never"], ["resume: {mode: never}", "resume.mode=never"]),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(DEMO, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimisation": {"stage": 1}}', ["zero_optimisation", "not a known key"]),
        ('{"gradient_clipping": 1.0}', ["gradient_clipping", "optimizer.clip"]),
        ('{"zero_optimization": {"stage": 4}}', ["stage 4", "0, 1, 2 or 3"]),
        ('{"zero_optimization": {"stag": 1}}', ["zero_optimization: stag is not a known key"]),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', ["offload_param", "stage 3"]),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', ["nvme", "set cpu"]),
        ('{"zero_optimization": {"stage": 3, "compute_grad_norm": false}}', ["compute_grad_norm", "not finite"]),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', ["both enabled"]),
        ('{"activation_checkpointing": {}}', ["memory.activation_checkpointing"]),
        ('{"data_types": {"param_dtype": "bf16"}}', ["data_types.param_dtype"]),
        ('{"bf16": true}', ["bf16", "keys and values"]),
        ("[]", ["not a JSON object"]),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}', ["zero_hpz_partition_size", "momentum"]),
        ('{"bf16": {"enabled": true}}', ["stage to 1"]),
        ('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}}', ["grad_accum_dtype"]),
        ("{", ["not JSON"]),
    ],
)
def test_a_wrong_engine_config_is_refused_by_name(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_engine_config(path)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_an_engine_is_a_name_or_a_path_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line a path is relative to the working directory, as any path there."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "beside" / "mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    text = DEMO.read_text(encoding="utf-8")
    recipe = tmp_path / "beside" / "recipe.yaml"
    recipe.write_text(text.replace("engine: zero1_fp32", "engine: mine.json"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    stages = {
        given: stage_of(load_engine_config(load_recipe(recipe.relative_to(tmp_path), overrides).engine))
        for given, overrides in [("", []), ("path", ["engine=mine.json"]), ("name", ["engine=zero1_bf16"])]
    }
    assert stages == {"": 3, "path": 2, "name": 1}


def test_an_engine_that_does_not_exist_is_told_with_the_names(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(DEMO.read_text(encoding="utf-8").replace("zero1_fp32", "zero9"))
    with pytest.raises(UserError, match=rf"{tmp_path}/zero9: .*zero0_fp32, .*zero3_fp32") as caught:
        load_engine_config(load_recipe(tmp_path / "recipe.yaml").engine)
    assert "\n" not in str(caught.value)


def test_a_shipped_recipe_is_found_by_name_and_names_no_place_of_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "demo", "large", "xl"):
        recipe = load_recipe(Path(name))
        assert recipe.probe is not None and recipe.probe.data.is_file()
        load_engine_config(recipe.engine)
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(Path("small"))
