"""Models are compared on what they have in common."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation import cli
from infoxlm_ds.evaluation.output import write_json
from infoxlm_ds.evaluation.results import MeanRow, Result
from infoxlm_ds.evaluation.retrieval import RetrievalRow
from infoxlm_ds.evaluation.tables import as_json, print_comparison, print_tables


def _row(**changes: Any) -> RetrievalRow:
    values: dict[str, Any] = dict.fromkeys(RetrievalRow.__dataclass_fields__, 0.0)
    values |= {"data": "x.jsonl", "lang": "de", "layer": 2, "n": 50, "pooling": "mean", "cross_script": False}
    return RetrievalRow(**values | {"forward": 0.5, "backward": 0.5} | changes)


def _compared(results: dict[str, list[RetrievalRow]]) -> list[list[str]]:
    screen = io.StringIO()
    print_comparison(results, Console(file=screen, width=120))
    return [line.split() for line in screen.getvalue().splitlines() if line.strip().startswith("x ")]


def test_each_layer_has_a_row_and_layers_are_never_averaged() -> None:
    one = [_row(layer=1, forward=0.2, backward=0.2), _row(layer=2, forward=0.8, backward=0.8)]
    rows = _compared({"one": one, "other": [_row(layer=2), _row(layer=1), _row(layer=0)]})
    assert [row[1:5] for row in rows] == [["1", "1", "0.200", "0.500"], ["2", "1", "0.800", "0.500"]]


def test_models_with_one_layer_each_are_compared_though_the_layers_differ() -> None:
    ((_, layer, *_),) = _compared({"one": [_row(layer=1)], "other": [_row(layer=8)]})
    assert layer == "1/8"


def test_results_are_named_by_their_folder_also_by_the_one_that_a_command_runs_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_json(tmp_path / folder / "rows.json", as_json(Result([_row()], []), {}))
    monkeypatch.chdir(tmp_path / "here")
    cli.compare([Path("rows.json"), Path("../there/rows.json")])
    assert re.search("languages +here +there", capsys.readouterr().out)


def test_the_table_of_a_long_family_fits_a_terminal_of_80_columns() -> None:
    screen, numbers = io.StringIO(), dict.fromkeys(MeanRow.__dataclass_fields__, 0.5)
    words = {
        "data": "x.jsonl",
        "group": "family Sino-Tibetan",
        "languages": 1,
        "layer": 2,
        "pooling": "mean",
        "projected": False,
        "score": "cosine",
    }
    mean = MeanRow(**numbers | words)  # type: ignore[arg-type]
    print_tables(Result([_row(projected=False, score="cosine")], [mean]), Console(file=screen, width=80))
    assert "chance" in screen.getvalue() and "Sino-Tibetan (1)" in screen.getvalue()


def test_only_common_languages_count() -> None:
    one = [_row(), _row(lang="ru", forward=0.9, backward=0.9)]
    ((_, _, count, ours, theirs, *_),) = _compared({"one": one, "other": [_row(), _row(lang="fr")]})
    assert (count, ours, theirs) == ("1", "0.500", "0.500")


def test_other_pairs_and_nothing_in_common_are_mistakes() -> None:
    with pytest.raises(UserError, match=r"de: not the same pairs \(one 50, other 40\)"):
        _compared({"one": [_row()], "other": [_row(n=40)]})
    for other in (_row(data="y.jsonl"), _row(lang="fr")):
        with pytest.raises(UserError, match="one, other have no file, layer and language in common"):
            _compared({"one": [_row()], "other": [other]})
