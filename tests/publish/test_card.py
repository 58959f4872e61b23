"""The model card says what the run did, and its code runs."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import metadata_load

from infoxlm_ds.config import Recipe
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.checksums import check_checksums
from infoxlm_ds.monitor.starts import read_starts
from infoxlm_ds.publish.card import Origin, licence_of
from infoxlm_ds.publish.compute import hours
from infoxlm_ds.publish.export import export
from infoxlm_ds.publish.history import read_history, sides_of
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks
from tests.monitor.test_boards import train_with_sinks
from tests.publish.hub import running

INFOXLM = str(Path(sys.executable).with_name("infoxlm"))
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
def test_the_code_of_a_run_without_projection(corpus: Path, tmp_path: Path, pooling: str) -> None:
    settings = (f"model.pooling={pooling}", "model.projection=false", "log.tensorboard=false", "optimizer.steps=2")
    run_ranks(train_with_sinks, 1, small_recipe(corpus, tmp_path / "run", *settings))
    export(tmp_path / "run", tmp_path / "out", ("hf",))
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), re.S)
    found: dict[str, Any] = {}
    exec(block.replace('"out', f'"{tmp_path}/out'), found)
    np.testing.assert_allclose(found["vectors"], SentenceEmbedder(tmp_path / "out").embed(SENTENCES)[0], atol=1e-5)


def test_a_card_says_what_the_run_did(run: Recipe, exported: Path) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "xlco/loss" in row][-1]
    assert f"| XlCo | {last['xlco/loss']:.3f} | {last['xlco/information_bound']:.3f} |" in text
    probe = [row for row in rows if "probe/de" in row][-1]
    assert f"| de | {probe['probe/de']:.3f} |" in text and "6 of 6 steps" in text
    assert "rank hours on cpu" in text and "on 2 rank(s)" in text and "floating-point operations" in text
    assert "more than 128 tokens" in text and str(run.run) not in text
    assert (exported / "curves.png").read_bytes()[:4] == b"\x89PNG"
    check_checksums(exported, "")


def test_its_metadata_are_what_the_hub_reads(exported: Path) -> None:
    data = metadata_load(exported / "README.md")
    assert data is not None and data["license"] == "other" and data["pipeline_tag"] == "sentence-similarity"
    assert {"de", "en"} <= set(data["language"]) and all(re.fullmatch("[a-z]{2,3}", c) for c in data["language"])


def test_a_licence_that_all_sources_state_is_the_models() -> None:
    one, other, none = (Origin("a", licence, "") for licence in ("Apache-2.0", "CC0-1.0", ""))
    assert licence_of([one, one]) == "apache-2.0"
    assert licence_of([one, other]) == licence_of([one, none]) == licence_of([]) == "other"


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_run_whose_metrics_are_lost_is_exported(
    run: Recipe, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.run, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.unlink() if damage == "missing" else metrics.write_bytes(b"\xff\x00{}\n[1]\n")
    export(tmp_path / "run", tmp_path / "out", ("hf",))
    assert "without curves and results" in capsys.readouterr().out
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


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


def _publish(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | variables
    command = [INFOXLM, "publish", str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_an_export_is_uploaded_whole(exported: Path) -> None:
    with running() as hub:
        told = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1"}
        refused = _publish(exported, "team/model", **told)
        assert refused.returncode == 2 and "--yes" in refused.stderr and not hub.created
        result = _publish(exported, "team/model", "--yes", "--private", **told)
        assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{hub.address}/team/model"
    assert hub.tokens == {"Bearer secret"} and hub.created[0]["name"] == "model"
    files = {str(path.relative_to(exported)): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert hub.files == files


def test_nothing_is_uploaded_if_the_user_says_no(exported: Path) -> None:
    ours, theirs = pty.openpty()
    with running() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": "secret"}
        command = [INFOXLM, "publish", str(exported), "team/model"]
        process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=subprocess.PIPE, text=True)
        os.write(ours, b"n\n")
        output, _ = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0 and "team/model (public)" in output and not hub.created


@pytest.mark.parametrize("mistake", ["no token", "no export", "damaged", "name", "refused", "no server"])
def test_what_prevents_an_upload_is_one_line(exported: Path, tmp_path: Path, mistake: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    name, told = "team/model", {"HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    if mistake == "no token":
        del told["HF_TOKEN"]
    elif mistake == "no export":
        (folder / "checksums.json").unlink()
    elif mistake == "damaged":
        (folder / "config.json").write_text("{}")
    elif mistake == "name":
        name = "team/model/more"
    with running() as hub:
        hub.refuse = 403
        address = hub.address
        if mistake == "no server":
            hub.server_close()
        result = _publish(folder, name, "--yes", HF_ENDPOINT=address, **told)
    said = {
        "no token": "there is no token",
        "no export": "is no export",
        "damaged": "differs from what was written: export it again",
        "name": "cannot be a repository",
        "refused": "did not take team/model",
        "no server": "did not take team/model",
    }
    (line,) = result.stderr.splitlines()
    assert said[mistake] in line and result.returncode == (1 if mistake in ("refused", "no server") else 2)
