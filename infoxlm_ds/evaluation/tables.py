"""Retrieval results: a table for each file, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.beside import OWN
from infoxlm_ds.evaluation.results import MeanRow, Result
from infoxlm_ds.evaluation.retrieval import Accuracy, RetrievalRow
from infoxlm_ds.model.sentence_vector import View


def print_tables(result: Result, console: Console) -> None:
    """Print a table for each file. For one view it shows every language and the means; for several, only the means of
    all languages."""
    for data, of_file in groupby(result.rows, key=lambda row: row.data):
        rows, means = list(of_file), [mean for mean in result.means if mean.data == data]
        several = len({(row.layer, row.pooling) for row in rows}) > 1
        console.print(_means_table(data, means) if several else _languages_table(data, rows, means))


def as_json(result: Result, beside: Mapping[str, Result]) -> dict[str, Any]:
    """`{"languages": [...], "means": [...], "beside": {model: {"languages": ..., "means": ...}}}`, to be written."""
    return _plain(result) | {"beside": {name: _plain(other) for name, other in beside.items()}}


def _plain(result: Result) -> dict[str, Any]:
    return {"languages": result.rows, "means": result.means}


def read_json(path: Path) -> list[RetrievalRow]:
    """The rows of languages that `infoxlm eval retrieval --json` wrote. UserError if it is another kind of file."""
    try:
        return [RetrievalRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["languages"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a result of `infoxlm eval retrieval --json`: {error}") from error


def print_comparison(results: Mapping[str, Sequence[RetrievalRow]], console: Console) -> None:
    """Print one table of several models, a column for each: accuracy@1, mean of both directions and of the languages
    that all models have. A file has one row if each model has one layer, which may differ; else a row for each view
    that all have. UserError if models have nothing in common, or other pairs of a language."""
    table = Table(title="mean accuracy@1, both directions", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("data", "layer", "languages"):
        table.add_column(heading, no_wrap=True)
    for heading in (*results, "trigrams", "chance"):
        table.add_column(heading, justify="right")
    for data in dict.fromkeys(row.data for rows in results.values() for row in rows):
        for layer, parts in _comparable(data, results):
            for only_cross in (False, True):
                chosen = [[row for row in rows if row.cross_script or not only_cross] for rows in parts]
                if chosen[0]:
                    _compare(table, Path(data).name.split(".jsonl")[0], layer, chosen, only_cross)
    if not table.row_count:
        raise UserError(f"{', '.join(results)} have no file, layer and language in common: evaluate on the same data")
    console.print(table)


def _comparable(
    data: str, results: Mapping[str, Sequence[RetrievalRow]]
) -> Iterator[tuple[str, list[list[RetrievalRow]]]]:
    """What models have in common of a file: views, and the rows of each model, with the same languages in order."""
    by_view: list[dict[View, dict[str, RetrievalRow]]] = []
    for of_model in results.values():
        by_view.append({})
        for row in of_model:
            if row.data == data:
                by_view[-1].setdefault(View(row.layer, row.pooling), {})[row.lang] = row
    if all(len(views) == 1 for views in by_view):
        choices = [[next(iter(views)) for views in by_view]]
    else:
        choices = [[view] * len(by_view) for view in by_view[0] if all(view in views for views in by_view)]
    for chosen in choices:
        models = [views[view] for views, view in zip(by_view, chosen, strict=True)]
        common = [lang for lang in models[0] if all(lang in rows for rows in models)]
        for lang in common:
            if len({rows[lang].n for rows in models}) > 1:
                counts = ", ".join(f"{name} {rows[lang].n}" for name, rows in zip(results, models, strict=True))
                raise UserError(f"{data}, {lang}: not the same pairs ({counts}): evaluate on the same file")
        if common:
            yield "/".join(dict.fromkeys(map(_label, chosen))), [[rows[lang] for lang in common] for rows in models]


def _label(view: View) -> str:
    return "own" if view.layer == OWN else f"{view.layer}{' cls' * (view.pooling == 'cls')}"


def _compare(table: Table, data: str, layer: str, parts: list[list[RetrievalRow]], only_cross: bool) -> None:
    models = [fmean(fmean((row.forward, row.backward)) for row in rows) for rows in parts]
    trigrams = fmean(fmean((row.trigram_forward, row.trigram_backward)) for row in parts[0])
    chance = fmean(row.chance for row in parts[0])
    label = f"{len(parts[0])}" + (" cross-script" if only_cross else "")
    table.add_row(data, layer, label, *(f"{value:.3f}" for value in (*models, trigrams, chance)))


def _languages_table(data: str, rows: Sequence[RetrievalRow], means: Sequence[MeanRow]) -> Table:
    table = _empty(data, rows[0], "language")
    for row in rows:
        _add(table, row.lang + (" *" if row.cross_script else ""), str(row.n), row)
    for _, of_kind in groupby(means, key=_kind):
        table.add_section()
        for mean in of_kind:
            _add(table, _name(mean), "", mean)
    return table


def _means_table(data: str, means: Sequence[MeanRow]) -> Table:
    table = _empty(data, means[0], "layer")
    for mean in means:
        if not _kind(mean):
            _add(table, f"{mean.layer} {mean.pooling}", _name(mean), mean)
    return table


def _empty(data: str, row: RetrievalRow | MeanRow, first: str) -> Table:
    """A table with columns and notes. `row`: any row of it."""
    by_language = first == "language"
    how = f", {row.pooling} pooling{', projected' * row.projected}" if by_language and row.layer != OWN else ""
    title = f"{Path(data).name}: accuracy@1, {row.score}{how}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    table.add_column("pairs" if by_language else "languages", no_wrap=True, justify="right" if by_language else "left")
    for heading in ("forward", "backward", "95 %", "trigrams", "chance"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = (
        "* cross-script: another script than the pivot's; 95 %: interval of the mean of both directions; "
        "trigrams: untrained TF-IDF on the same pairs, mean of both directions"
    )
    return table


def _kind(mean: MeanRow) -> str:
    """What a group has in common: script or family; "" for other groups."""
    kind, _, name = mean.group.partition(" ")
    return kind if name and kind in ("script", "family") else ""


def _name(mean: MeanRow) -> str:
    names = {"all": f"mean of {mean.languages}", "cross-script": f"mean of {mean.languages} *"}
    return names.get(mean.group, f"{mean.group.removeprefix(_kind(mean)).strip()} ({mean.languages})")


def _add(table: Table, first: str, second: str, row: Accuracy) -> None:
    trigrams = fmean((row.trigram_forward, row.trigram_backward))
    forward, backward, low, high, both, chance = (
        f"{value:.3f}" for value in (row.forward, row.backward, row.low, row.high, trigrams, row.chance)
    )
    table.add_row(first, second, forward, backward, f"{low}-{high}", both, chance)
