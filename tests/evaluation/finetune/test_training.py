"""A tiny model learns made-up tasks; what is written loads in transformers; a killed seed goes on as if never
stopped."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.finetune import training
from infoxlm_ds.evaluation.finetune.data import read_data
from infoxlm_ds.evaluation.finetune.run import finetune
from infoxlm_ds.evaluation.finetune.scores import entity_f1
from infoxlm_ds.evaluation.finetune.settings import Settings, keep_settings
from infoxlm_ds.evaluation.finetune.states import save_state
from tests.distributed.ranks import run_ranks
from tests.evaluation.finetune.made_up import settings, write_pairs, write_questions, write_words


def _finetune(_rank: int, _world_size: int, chosen: Settings) -> tuple[dict[str, Any], str]:
    """The summary, and what was printed as a table."""
    printed = io.StringIO()
    return finetune(chosen, Console(file=printed, width=200)), printed.getvalue()


def _run(chosen: Settings) -> tuple[dict[str, Any], str]:
    summary, printed = run_ranks(_finetune, 1, chosen)[0]
    return summary, printed


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "x"
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Any, str]:
    """Two seeds on pairs: settings, summary, table."""
    chosen = settings("pawsx", model_folder, pairs, tmp_path_factory.mktemp("trained"), seeds=2)
    return chosen, *_run(chosen)


def test_pairs_are_learned_and_every_language_is_measured(trained: tuple[Settings, Any, str]) -> None:
    _, summary, printed = trained
    mean = summary["mean"]["accuracy"]
    assert list(mean) == ["en", "de", "ru", "avg", "gap"]
    assert mean["en"] > 0.95 > 0.6 > summary["seeds"][0]["dev"][0]
    assert "pawsx: accuracy of the test files in percent, 2 seeds" in printed and "±" in printed
    chosen = trained[0]
    assert json.loads((chosen.out / "results.json").read_text()) == summary
    assert list((chosen.out / "seed-1" / "tensorboard").glob("events*"))
    assert not list(chosen.out.glob("seed-*/*-[0-9]*"))  # states


def test_transformers_loads_the_result_and_gives_the_same_scores(trained: tuple[Settings, Any, str]) -> None:
    chosen, summary, _ = trained
    folder = chosen.out / "seed-2" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for language, examples in read_data(chosen).test.items():
        first, second = zip(*(x.texts for x in examples), strict=True)
        options = {"padding": True, "truncation": True, "max_length": chosen.max_tokens, "return_tensors": "pt"}
        inputs = tokenizer(first, second, **options)
        with torch.no_grad():
            best = model(**inputs).logits.argmax(-1)
        right = [model.config.id2label[int(x)] == y.labels[0] for x, y in zip(best, examples, strict=True)]
        assert np.mean(right) == pytest.approx(summary["seeds"][1]["test"]["accuracy"][language])


def test_words_are_learned_and_transformers_gives_the_same_labels(model_folder: Path, tmp_path: Path) -> None:
    write_words(tmp_path / "data")
    options = {"epochs": 6, "batch_tokens": 128, "dropout": 0.0}
    chosen = settings("ner", model_folder, tmp_path / "data", tmp_path / "out", **options)
    summary, _ = _run(chosen)
    score = summary["mean"]["f1"]["en"]
    assert score > 0.9
    folder = tmp_path / "out" / "seed-1" / "model"
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "O", 1: "B-LOC", 2: "I-LOC"}
    examples = read_data(chosen).test["en"]
    inputs = tokenizer([x.texts for x in examples], is_split_into_words=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model.eval()(**inputs).logits.argmax(-1)
    found = []
    for i, example in enumerate(examples):
        firsts = [inputs.word_ids(i).index(word) for word in range(len(example.texts))]
        found.append([model.config.id2label[int(best[i, first])] for first in firsts])
    assert entity_f1([x.labels for x in examples], found) == pytest.approx(score)


def test_answers_are_learned_and_transformers_gives_the_same(model_folder: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "data")
    options = {"epochs": 4, "batch_tokens": 512, "dropout": 0.0}
    chosen = settings("xquad", model_folder, tmp_path / "data", tmp_path / "out", **options)
    summary, printed = _run(chosen)
    mean = summary["mean"]
    assert mean["f1"]["en"] > 0.9 and mean["exact"]["de"] > 0.9
    assert f"{100 * mean['f1']['de']:.1f} / {100 * mean['exact']['de']:.1f}" in printed
    folder = tmp_path / "out" / "seed-1" / "model"
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    short = [x for x in read_data(chosen).test["en"] if len(x.texts[1].split()) < 10]
    right = 0
    for example in short:
        inputs = tokenizer(*example.texts, return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")[0]
        with torch.no_grad():
            out = model(**inputs)
        first, last = int(out.start_logits.argmax()), int(out.end_logits.argmax())
        right += example.texts[1][offsets[first, 0] : offsets[last, 1]].strip() == example.labels[0]
    assert len(short) > 3 and right >= 0.8 * len(short)


def _stopped(rank: int, world_size: int, chosen: Settings, epoch: int, saved: bool) -> None:
    """Stop in an epoch, before or after its state is written."""

    def save_and_stop(folder: Path, engine: Any, progress: Any) -> None:
        if saved or progress.epoch < epoch:
            save_state(folder, engine, progress)
        if progress.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_state", save_and_stop)
        _finetune(rank, world_size, chosen)


@pytest.mark.parametrize("saved", [True, False])
def test_a_stopped_seed_goes_on_as_if_never_stopped(
    trained: tuple[Settings, Any, str], model_folder: Path, pairs: Path, tmp_path: Path, saved: bool
) -> None:
    whole, expected, _ = trained
    chosen = settings("pawsx", model_folder, pairs, tmp_path)
    run_ranks(_stopped, 1, chosen, 3, saved)
    found, _ = _run(chosen)
    assert found["seeds"][0] == expected["seeds"][0]
    weights = [load_file(out / "seed-1" / "model" / "model.safetensors") for out in (whole.out, tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_so_does_one_in_16_bits_as_on_a_gpu(
    model_folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training.ENGINES, "cpu", "zero1_bf16")
    whole, stopped = (settings("pawsx", model_folder, pairs, tmp_path / x, epochs=3) for x in ("whole", "stopped"))
    run_ranks(_stopped, 1, stopped, 2, True)
    assert _run(stopped)[0]["seeds"] == _run(whole)[0]["seeds"]
    weights = [load_file(x.out / "seed-1" / "model" / "model.safetensors") for x in (whole, stopped)]
    for name, values in weights[0].items():
        assert values.dtype == torch.float32 and torch.equal(values, weights[1][name])


def test_finished_seeds_are_only_read(trained: tuple[Settings, Any, str]) -> None:
    chosen, summary, _ = trained
    written = (chosen.out / "seed-1" / "result.json").stat().st_mtime_ns
    again, _ = _run(chosen)
    assert again == summary and (chosen.out / "seed-1" / "result.json").stat().st_mtime_ns == written


def test_other_settings_in_the_same_folder_are_the_users_mistake(trained: tuple[Settings, Any, str]) -> None:
    chosen = trained[0]
    keep_settings(replace(chosen, seeds=9))  # more seeds may be asked for
    other = replace(chosen, learning_rate=1e-5)
    with pytest.raises(UserError, match="has results with another learning_rate: give another folder"):
        keep_settings(other)
    with pytest.raises(UserError, match=r"--out .* cannot be written"):
        keep_settings(replace(chosen, out=chosen.out / "settings.json" / "below"))


def test_a_seed_ends_when_its_patience_does(model_folder: Path, tmp_path: Path) -> None:
    """With labels by chance, the dev score does not rise for long."""
    write_pairs(tmp_path / "data", wrong=True, train=24)
    chosen = settings("pawsx", model_folder, tmp_path / "data", tmp_path / "out", epochs=50, patience=2)
    (result,) = _run(chosen)[0]["seeds"]
    dev, best = result["dev"], result["epoch"]
    assert len(dev) == best + 2 < 50
    assert dev[best - 1] == max(dev) and dev.index(max(dev)) == best - 1


def test_steps_that_are_not_finite_end_a_seed(model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seed 1: gradients are not finite at step .*: lower --learning-rate"):
        _run(settings("pawsx", model_folder, pairs, tmp_path, learning_rate=1e30))


def test_the_target_dev_files_can_choose_the_epoch(model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    options = {"train_languages": ("en", "de"), "select": "target", "epochs": 1}
    chosen = settings("pawsx", model_folder, pairs, tmp_path, **options)
    data = read_data(chosen)
    assert list(data.dev) == ["ru"] and list(data.test) == ["en", "de", "ru"] and len(data.train) == 240
    (result,) = _run(chosen)[0]["seeds"]
    assert result["epoch"] == 1 and list(result["test"]["accuracy"]) == ["en", "de", "ru"]
