"""The model card says what the run did, and its code runs."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import metadata_load

from data_prep.merge import merge
from infoxlm_ds.checkpoint.store import read_state
from infoxlm_ds.config import Model, Recipe
from infoxlm_ds.data.manifest import load_manifest
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.checksums import check_checksums
from infoxlm_ds.monitor.history import read_history, sides_of
from infoxlm_ds.monitor.starts import read_starts
from infoxlm_ds.publish.card import Facts, card
from infoxlm_ds.publish.compute import hours
from infoxlm_ds.publish.export import export
from infoxlm_ds.publish.origins import Origin, licence_of, origins_of
from infoxlm_ds.publish.trained import read_trained
from tests.corpus import small_recipe
from tests.data_prep.small import prepare
from tests.distributed.ranks import run_ranks
from tests.monitor.test_boards import train_with_sinks

SENTENCES = ["Open the door.", "Öffne die Tür."]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run on two ranks with a probe and a projection."""
    folder = tmp_path_factory.mktemp("card") / "run"
    probe = f"probe={{data: {corpus.parent / 'rows.jsonl'}, every: 2, pairs: 20, languages: [de]}}"
    more = ("model.projection=true", "log.tensorboard=false")
    recipe = small_recipe(corpus, folder, probe, *more)
    run_ranks(train_with_sinks, 2, recipe)
    return recipe


@pytest.fixture(scope="module")
def exported(run: Recipe) -> Path:
    out = run.run.parent / "my-model"
    export(run.run, out, ("hf", "sentence-transformers", "onnx"))
    return out


def test_the_code_of_a_card_gives_our_vectors(exported: Path) -> None:
    pytest.importorskip("sentence_transformers")
    expected = SentenceEmbedder(exported).embed(SENTENCES)[0]
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    for block in blocks:
        code = f"{block}import numpy\nnumpy.save('vectors.npy', vectors)\n"
        subprocess.run([sys.executable, "-c", code], cwd=exported.parent, check=True, capture_output=True)
        np.testing.assert_allclose(np.load(exported.parent / "vectors.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_code_of_a_run_without_projection(
    corpus: Path, tmp_path: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"model.pooling={pooling}", "model.projection=false", "log.tensorboard=false", "optimizer.steps=2")
    run_ranks(train_with_sinks, 1, small_recipe(corpus, tmp_path / "run", *settings))
    out = tmp_path / 'a "model"'
    export(tmp_path / "run", out, ("hf",))
    (block,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.S)
    found: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(block, found)
    np.testing.assert_allclose(found["vectors"], SentenceEmbedder(out).embed(SENTENCES)[0], atol=1e-5)


def test_a_card_says_what_the_run_did(run: Recipe, exported: Path) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "xlco/loss" in row][-1]
    assert f"| XlCo | {last['xlco/loss']:.3f} | {last['xlco/information_bound']:.3f} |" in text
    probe = [row for row in rows if "probe/de" in row][-1]
    assert f"| de | {probe['probe/de']:.3f} |" in text and "6 of 6 steps" in text
    assert "rank hours on cpu" in text and "on 2 ranks" in text and "floating-point operations" in text
    assert "more than 128 tokens" in text and "XLM-R base has 278M" in text
    assert not any(str(path) in text for path in (run.run, run.corpus, run.engine, Path.home()))
    assert (exported / "curves.png").read_bytes()[:4] == b"\x89PNG"
    check_checksums(exported, "")


def test_its_metadata_are_what_the_hub_reads(exported: Path) -> None:
    data = metadata_load(exported / "README.md")
    assert data is not None and data["license"] == "other" and data["pipeline_tag"] == "sentence-similarity"
    assert {"de", "en"} <= set(data["language"]) and all(re.fullmatch("[a-z]{2,3}", c) for c in data["language"])


def test_a_licence_that_all_sources_state_is_the_models() -> None:
    one, other, none = (Origin("a", licence, "") for licence in ("Apache-2.0", "CC0-1.0", ""))
    assert licence_of([one, one]) == "apache-2.0"
    assert licence_of([Origin("a", "as our contract says", "")]) == "other"
    assert licence_of([one, other]) == licence_of([one, none]) == licence_of([]) == "other"


def test_origins_of_merged_and_older_corpora_are_found(corpus: Path, tmp_path: Path) -> None:
    stated = {"license": "cc0-1.0", "homepage": "https://example.org"}
    source = {"name": "nway.b", "kind": "nway", "format": "jsonl", "path": "rows.jsonl"} | stated
    shutil.copy(corpus.parent / "rows.jsonl", tmp_path)
    prepare(tmp_path, corpus, [source], languages=["en", "de"], max_tokens=48)
    merge(tmp_path / "both", [corpus, tmp_path / "corpus"])
    assert origins_of(tmp_path / "both") == [
        Origin("nway.rows", "", ""),
        Origin("nway.b", "cc0-1.0", "https://example.org"),
    ]
    tree = load_manifest(corpus)
    old = tree.prep["description"]["sources"][0]
    del old["license"], old["homepage"]  # as corpora were before there were these keys
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text(tree.render(), encoding="utf-8")
    assert origins_of(tmp_path / "old") == [Origin("nway.rows", "", "")]
    assert origins_of(tmp_path / "none") == []


def _facts(run: Recipe, history: Path, **trained: Any) -> Facts:
    checkpoint = run.run / "checkpoints" / "step-00000006"
    state, found = read_state(checkpoint), read_trained(run, run.run, checkpoint, None)
    return Facts("m", ("hf",), replace(found, **trained), history, state, read_history(history, 6), [])


def test_no_flipped_bit_of_the_metrics_stops_an_export(run: Recipe, tmp_path: Path) -> None:
    whole, chance = (run.run / "metrics.jsonl").read_bytes(), random.Random(0)
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    facts = _facts(run, tmp_path)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        assert card(replace(facts, history=read_history(tmp_path, 6)), False).startswith("---\n")


def test_what_was_measured_before_the_probe_was_taken_out_is_told(run: Recipe) -> None:
    text = card(_facts(run, run.run, recipe=run.model_copy(update={"probe": None})), False)
    assert "Held-out retrieval at step 6: accuracy@1" in text and "| de | 0." in text


def test_folders_of_the_user_are_not_in_a_card_and_names_on_the_hub_are(run: Recipe) -> None:
    def begun_with(init: str) -> str:
        return card(_facts(run, run.run, recipe=run.model_copy(update={"model": _model(run, init)})), False)

    local, public = begun_with("/home/someone/secret/start"), begun_with("FacebookAI/xlm-roberta-base")
    assert "someone" not in local and "weights of `start`" in local and "base_model" not in local
    assert "base_model: FacebookAI/xlm-roberta-base" in public and "a licence of their own" in public


def _model(run: Recipe, init: str) -> Model:
    return run.model.model_copy(update={"init": init})


@pytest.mark.parametrize("damage", ["missing", "broken", "folder"])
def test_a_run_whose_metrics_are_lost_is_exported(
    run: Recipe, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.run, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.unlink()
    if damage == "broken":
        metrics.write_bytes(b"\xff\x00{}\n[1]\n")
    elif damage == "folder":
        metrics.mkdir()
    export(tmp_path / "run", tmp_path / "out", ("hf",))
    assert "without curves and results" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Nothing was measured" in text and "Retrieval was not measured" in text and "The corpus has de, en" in text


def test_without_matplotlib_a_card_has_no_picture_and_it_is_said(
    run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("infoxlm_ds.publish.curves.find_spec", lambda name: None)
    export(run.run, tmp_path / "out", ("hf",))
    assert "without a picture of the curves, as matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "out" / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_hours_are_those_of_each_starts_ranks(run: Recipe, tmp_path: Path) -> None:
    (start,) = read_starts(run.run)
    assert (start["step"], start["ranks"], start["device"]) == (0, 2, "cpu")
    history = read_history(run.run, 6)
    later = start | {"step": 3, "ranks": 4, "device": "NVIDIA H100"}
    lines = [json.dumps(start), json.dumps(later), '{"step": 4, "ra']
    (tmp_path / "starts.jsonl").write_text("\n".join(lines))
    spent = hours(history, tmp_path, 2)
    parts = [sum(row["seconds"] for row in history.intervals if (row["step"] > 3) == late) for late in (False, True)]
    assert spent.hours == pytest.approx({"cpu": 2 * parts[0] / 3600, "NVIDIA H100": 4 * parts[1] / 3600})
    assert spent.ranks == [2, 4]


def test_a_pair_of_codes_with_hyphens_is_divided_where_both_are_known() -> None:
    assert sides_of("de-en", set()) == ["de", "en"]
    assert sides_of("en-zh-Hans", {"en", "zh-Hans"}) == ["en", "zh-Hans"]
    assert sides_of("sr-Latn-zh-Hans", set()) == ["sr-Latn-zh-Hans"]
