"""What is measured of each layer, on vectors whose answer is known, and the command on a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infoxlm_ds import cli
from infoxlm_ds.evaluation.layers import LayerRow, anisotropy, centroid_distance, language_probe
from infoxlm_ds.evaluation.output import write_json

SHIFT = np.array([3, 4], np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def test_languages_on_their_own_axes_are_told_apart_and_equal_ones_are_not() -> None:
    chance = np.random.default_rng(0)
    rows = [list(range(100))] * 3
    apart = [_unit(chance.normal(size=(100, 8)) + 9 * np.eye(8)[language]) for language in range(3)]
    assert language_probe(apart, rows) == pytest.approx((1, 1 / 3))
    same = _unit(chance.normal(size=(100, 8)))
    accuracy, guess = language_probe([same, same, same], rows)
    assert accuracy == pytest.approx(1 / 3, abs=0.02) and guess == pytest.approx(1 / 3)


def test_the_distance_of_centroids_is_in_units_of_the_spread() -> None:
    pivot = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)  # all at distance 1 from their mean
    assert centroid_distance(pivot, pivot) == 0
    assert centroid_distance(pivot, pivot + SHIFT) == pytest.approx(5)
    assert centroid_distance(2 * pivot, 2 * pivot + SHIFT) == pytest.approx(2.5)


def test_anisotropy_is_the_mean_cosine_of_other_rows() -> None:
    line = _unit(np.ones((50, 4)))
    assert anisotropy(line, [list(range(50))]) == pytest.approx(1)
    around = _unit(np.random.default_rng(0).normal(size=(2000, 64)))
    assert anisotropy(around, [list(range(2000))]) == pytest.approx(0, abs=0.01)
    two = np.concatenate([around, around])  # translations have cosine 1, and are not counted
    assert anisotropy(two, [list(range(2000))] * 2) == pytest.approx(0, abs=0.01)


def test_the_command_has_a_row_for_each_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    texts = [("The lamp is on.", "Das Licht ist an."), ("Open the door.", "Öffne die Tür."), ("Kitchen", "Küche")] * 4
    rows = [
        json.dumps({"text": {"en": f"{english} {i}", "de": f"{german} {i}"}})
        for i, (english, german) in enumerate(texts)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = (
        "--model",
        model_folder,
        "--data",
        tmp_path / "rows.jsonl",
        "--min-pairs",
        2,
        "--json",
        tmp_path / "out.json",
    )
    monkeypatch.setattr("sys.argv", ["infoxlm", "eval", "layers", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and "anisotropy" in capsys.readouterr().out
    ((_, found),) = json.loads((tmp_path / "out.json").read_text()).items()
    assert [(row["layer"], row["pooling"]) for row in found] == [(layer, "mean") for layer in range(4)]
    assert all(np.isfinite([*row.values()][2:]).all() for row in found)


def test_a_figure_that_few_rows_do_not_give_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "rows.json", {"rows": [LayerRow(1, "mean", 0.5, float("nan"), float("nan"), 0.1, 0.2)]})
    (row,) = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert row["language"] is None and row["retrieval"] == 0.5
