"""What TensorBoard, metrics.csv and Weights & Biases show of a run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from infoxlm_ds import trainer
from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Log, Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.monitor.boards import Csv
from infoxlm_ds.monitor.pictures import heat_map
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.monitor.tags import GROUPS, tag
from infoxlm_ds.reporting import begin
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks


def train_with_sinks(rank: int, world: int, recipe: Recipe) -> None:
    """Train, with rank 0's outputs open."""
    start_ranks()
    inputs = agreed_inputs(recipe)
    state = build(inputs)
    try:
        if rank:
            trainer.fit(state, None)
        else:
            with Sinks(recipe.run, state.step, recipe.optimizer.steps, recipe.log) as sinks:
                begin(state, sinks)
                trainer.fit(state, sinks)
    finally:
        inputs.loader.close()


@pytest.fixture(scope="module")
def shown(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Any]:
    """A run on two ranks with all that TensorBoard shows of it."""
    run = tmp_path_factory.mktemp("shown") / "kiswahili"
    probe = f"probe={{data: {corpus.parent / 'rows.jsonl'}, every: 2, pairs: 20, languages: [de, fr]}}"
    recipe = small_recipe(corpus, run, "log.csv=true", "log.geometry=2", "batch.xlco_pairs=10", probe)
    run_ranks(train_with_sinks, 2, recipe)
    events = EventAccumulator(str(run / "tensorboard" / "kiswahili"), {"scalars": 0, "images": 0, "tensors": 0})
    return recipe, events.Reload()


def test_scalars_are_in_groups_and_losses_by_language(shown: tuple[Recipe, Any]) -> None:
    tags = shown[1].Tags()["scalars"]
    groups = {tag.partition("/")[0] for tag in tags}
    assert groups <= {*GROUPS, "loss_mmlm", "loss_tlm", "loss_xlco"}
    for name in ("loss/mmlm", "bound/xlco", "retrieval/mean", "contrast/queue_filled", "momentum/distance"):
        assert name in tags
    assert {"loss_mmlm/ko", "loss_tlm/de", "loss_xlco/de-en", "loss_xlco/de"} <= set(tags)


def test_pictures_of_each_probe_and_the_ages_of_keys(shown: tuple[Recipe, Any]) -> None:
    recipe, events = shown
    assert events.Tags()["images"] == ["retrieval/layers", "retrieval/similarity"]
    pictures = events.Images("retrieval/layers")
    assert [picture.step for picture in pictures] == [2, 4, 6]
    with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as picture:
        assert picture.size == (pictures[-1].width, pictures[-1].height)
    assert events.Tags()["distributions"] == ["contrast/queue_age"]
    ages = events.Histograms("contrast/queue_age")[-1].histogram_value
    assert (ages.num, ages.min) == (recipe.contrast.queue.size, 0)


def test_settings_texts_and_the_page_of_custom_scalars(shown: tuple[Recipe, Any]) -> None:
    events = shown[1]
    data = events.summary_metadata
    assert {"recipe/text_summary", "environment/text_summary", "custom_scalars__config__"} <= set(data)
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "xlco_pairs: 10" in text
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(data)


def test_the_csv_holds_the_same_and_loses_only_later_steps(shown: tuple[Recipe, Any]) -> None:
    recipe, events = shown
    path = recipe.run / "metrics.csv"
    rows = list(csv.DictReader(path.open()))
    for name in ("loss/xlco", "loss_mmlm/ko", "retrieval/mean"):
        found = {int(row["step"]): float(row["value"]) for row in rows if row["tag"] == name}
        assert found == pytest.approx({event.step: event.value for event in events.Scalars(name)}, rel=1e-6)
    path.write_text(path.read_text() + "7,loss/mm")
    again = Csv(recipe.run, 4)
    again.scalars(5, {"loss/total": 0.5})
    again.close()
    kept = list(csv.DictReader(path.open()))
    assert kept == [row for row in rows if int(row["step"]) <= 4] + [{"step": "5", "tag": "loss/total", "value": "0.5"}]


def test_a_run_of_weights_and_biases_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, log = tmp_path / "run", Log(tensorboard=False, wandb="infoxlm")
    identities = []
    for first in (0, 2):
        with Sinks(run, first, 4, log) as sinks:
            sinks.begin({"recipe": "a: 1"}, {"batch.lanes": 2})
            sinks.write(first + 1, {"mmlm/loss": 0.5})
            sinks.picture(first + 1, "retrieval/layers", np.zeros((4, 4, 3), np.uint8))
            sinks.histogram(first + 1, "contrast/queue_age", np.arange(4))
        identities.append((run / "wandb" / "id").read_text())
    assert identities[0] == identities[1]
    assert list(run.glob(f"wandb/offline-run-*/run-{identities[0]}.wandb"))


def test_a_tag_has_a_group_that_is_known() -> None:
    assert tag("loss") == "loss/total" and tag("tlm/information_bound") == "bound/tlm"
    assert tag("xlco/accuracy") == "contrast/accuracy" and tag("probe/de") == "retrieval/de"
    assert tag("speed/data_wait_share") == "data/wait_share" and tag("checkpoint/blocked") == "checkpoint/blocked"


def test_a_heat_map_is_dark_where_values_are_high_and_grey_where_there_are_none() -> None:
    picture = heat_map("t", np.array([[0.0, 1.0, np.nan]]), ["row"], ["a", "b", "c"], figures=False)
    darkest, colours = picture.sum(2).min(), {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert {(247, 251, 255), (8, 48, 107), (200, 200, 200)} <= colours and darkest < 200


def test_the_last_vectors_by_layer_are_the_representations(corpus: Path, tmp_path: Path) -> None:
    def check(rank: int, world: int, recipe: Recipe) -> None:
        start_ranks()
        inputs = agreed_inputs(recipe)
        state = build(inputs)
        inputs.loader.close()
        batch = state.loader.longest_batch()
        encoder = state.objective.model.sentence_encoder()
        with torch.no_grad():
            layers, vectors = encoder.by_layer(batch.tokens), encoder(batch.tokens)
        assert layers.shape == (len(vectors), 3, recipe.model.width)
        torch.testing.assert_close(layers[:, -1], vectors)
        torch.testing.assert_close(layers[:, 1], vectors * layers[:, 1].norm(dim=1, keepdim=True))

    for pooling in ("mean", "cls"):
        run_ranks(
            check, 1, small_recipe(corpus, tmp_path / pooling, f"model.pooling={pooling}", "model.projection=false")
        )
