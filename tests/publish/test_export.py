"""transformers alone loads an exported run, and the hidden states are those that were trained."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, XLMRobertaForMaskedLM, pipeline

from infoxlm_ds.build import agreed_inputs, build, check_inputs
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.checksums import check_checksums
from infoxlm_ds.model.pretrained import init_config
from infoxlm_ds.publish.export import export
from infoxlm_ds.publish.trained import SAMPLE
from infoxlm_ds.trainer import fit
from tests.corpus import EMBEDDED, ROOT, small_recipe
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
    """A run folder with checkpoints of steps 2, 4 and 6 and its export beside it."""
    run = tmp_path_factory.mktemp("exported") / "run"
    probe = f"probe={{data: {EMBEDDED / 'home_assistant.dev.jsonl.xz'}, languages: [de, ru], pairs: 20, every: 2}}"
    run_ranks(_train, 1, small_recipe(corpus, run, probe, "checkpoint.keep=3"))
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


def test_every_file_of_an_export_has_a_hash_and_a_changed_byte_is_refused(exported: Path, tmp_path: Path) -> None:
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "0_Transformer/model.safetensors", "encoder/config.json"} <= files
    assert files - {"checksums.json"} == json.loads((exported / "checksums.json").read_text()).keys()
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    for name in sorted(files - {"checksums.json"}):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(UserError, match=f"{name} differs from what was written"):
            SentenceEmbedder(folder)
        with pytest.raises(UserError, match=f"{name} differs from what was written"):
            init_config(str(folder))
        (folder / name).write_bytes(whole)
    SentenceEmbedder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "modules.json"])
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
    run_ranks(
        _start, 1, small_recipe(corpus, run, "optimizer.steps=7", "resume.allow_change=[optimizer, probe, checkpoint]")
    )
    export(run, tmp_path / "out")


def _weights(folder: Path) -> torch.Tensor:
    return torch.cat([value.ravel() for _, value in sorted(load_file(folder / "model.safetensors").items())])


def test_a_step_is_chosen_by_number_and_the_best_by_the_probe(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(exported.parent / "run", tmp_path / "run"))
    for step in (2, 4):
        export(run, tmp_path / str(step), ["hf"], step=step)
        assert f"step-0000000{step}" in capsys.readouterr().out
    assert not torch.equal(_weights(tmp_path / "2"), _weights(tmp_path / "4"))
    accuracies = {1: 0.9, 2: 0.4, 4: 0.6, 6: 0.5}
    lines = [json.dumps({"step": step, "probe/mean": value}) for step, value in accuracies.items()]
    (run / "metrics.jsonl").write_text("\n".join(['{"step": 3, "loss": 1}', *lines, '{"step": 4, "pro']))
    export(run, tmp_path / "best", ["hf"], best=True)
    told = capsys.readouterr().out
    assert "step 4 has the best probe of the 3 checkpoints" in told and "step 1 had 0.900" in told
    assert torch.equal(_weights(tmp_path / "best"), _weights(tmp_path / "4"))


def test_a_choice_that_cannot_be_made_is_one_line(exported: Path, tmp_path: Path) -> None:
    run, out = Path(shutil.copytree(exported.parent / "run", tmp_path / "run")), tmp_path / "out"
    with pytest.raises(UserError, match="no checkpoint of step 3, but of 2, 4, 6"):
        export(run, out, step=3)
    with pytest.raises(UserError, match="exclude each other"):
        export(run, out, step=2, best=True)
    with pytest.raises(UserError, match=r"--layer 3 is out of range: .* 0 \(embeddings\) to 2"):
        export(run, out, layer=3)
    with pytest.raises(UserError, match="--as gguf: give one of hf, sentence-transformers, onnx"):
        export(run, out, ["hf", "gguf"])
    (run / "metrics.jsonl").write_text('{"step": 1, "probe/mean": 0.9}\n{"step": 3, "probe/mean": 0.9}\n')
    with pytest.raises(UserError, match="probes were at steps 1, 3, the checkpoints are of steps 2, 4, 6"):
        export(run, out, best=True)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has no probe: set probe in the recipe"):
        export(run, out, best=True)
    assert not list(tmp_path.glob("out*"))


def test_a_package_that_is_missing_is_named(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infoxlm_ds.publish.onnx.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxruntime, onnxscript: pip install 'infoxlm-ds\[onnx\]'"):
        export(exported.parent / "run", tmp_path / "out", ["onnx"])


def test_without_sentence_transformers_its_files_are_written_and_it_is_told_that_they_were_not_checked(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("infoxlm_ds.publish.sentence_transformers.find_spec", lambda name: None)
    export(exported.parent / "run", tmp_path / "out", ["sentence-transformers"])
    assert "not checked, as the library is not installed" in capsys.readouterr().out
    assert (tmp_path / "out" / "modules.json").is_file()


def test_the_loss_of_int8_is_measured_on_the_data_of_the_probe(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    export(exported.parent / "run", tmp_path / "out", ["onnx"], layer=2)
    told = capsys.readouterr().out
    assert re.search(r"accuracy@1 0\.\d{3} in place of 0\.\d{3} \(probe data, 2 languages\)", told)
    assert "layer 2, mean pooling, without the projection" in told
    assert {"onnx/model.onnx", "onnx/model_int8.onnx"} <= json.loads(
        (tmp_path / "out" / "checksums.json").read_text()
    ).keys()


def test_an_export_that_does_not_give_the_trained_vectors_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infoxlm_ds.publish.trained.Trained.difference", lambda *_: 1e-3)
    with pytest.raises(RuntimeError, match="sentence vectors differ"):
        export(exported.parent / "run", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("document", ["README.md", "docs/export.md", "docs/api.md"])
def test_the_documented_lines_of_python_run(
    document: str, exported: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript", "sentence_transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    export(exported.parent / "run", tmp_path / "my-model", ["hf", "sentence-transformers", "onnx"], layer=1)
    expected = SentenceEmbedder(tmp_path / "my-model").embed(["Open the door.", "Öffne die Tür."])[0]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == {"README.md": 1, "docs/export.md": 4, "docs/api.md": 2}[document]
    monkeypatch.chdir(tmp_path)
    Path("my-corpus").symlink_to(corpus)
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        if "vectors" in names:
            torch.testing.assert_close(torch.as_tensor(names["vectors"]), torch.as_tensor(expected), atol=1e-5, rtol=0)
        if "means" in names:
            means = torch.nn.functional.normalize(names["means"].detach(), dim=1)
            torch.testing.assert_close(means, torch.as_tensor(expected), atol=1e-5, rtol=0)


def _start(rank: int, world: int, recipe: Recipe) -> None:
    start_ranks()
    build(agreed_inputs(recipe)).loader.close()
