"""Retrieval results: a table for each file, and JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.retrieval import RetrievalRow

_ACCURACIES = ("forward", "backward", "trigram_forward", "trigram_backward", "chance")


def print_tables(rows: Sequence[RetrievalRow], console: Console) -> None:
    """Print a table for each file. For one layer it shows every language and the means; for several, only the means."""
    for data, of_file in groupby(rows, key=lambda row: row.data):
        layers = [list(of_layer) for _, of_layer in groupby(of_file, key=lambda row: row.layer)]
        console.print(_table(data, layers))


def write_json(rows: Sequence[RetrievalRow], path: Path) -> None:
    """Write a list with one object for each `RetrievalRow`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> list[RetrievalRow]:
    """Read the rows that `write_json` wrote. UserError if it is another kind of file."""
    try:
        return [RetrievalRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a result of `infoxlm eval retrieval --json`: {error}") from error


def print_comparison(results: Mapping[str, Sequence[RetrievalRow]], console: Console) -> None:
    """Print one table of several models, a column for each: accuracy@1, mean of both directions and of the languages
    that all models have. A file has one row if each model has one layer, which may differ; else a row for each layer
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
    """What models have in common of a file: layers, and the rows of each model, with the same languages in order."""
    by_layer: list[dict[int, dict[str, RetrievalRow]]] = []
    for of_model in results.values():
        by_layer.append({})
        for row in of_model:
            if row.data == data:
                by_layer[-1].setdefault(row.layer, {})[row.lang] = row
    if all(len(layers) == 1 for layers in by_layer):
        choices = [[next(iter(layers)) for layers in by_layer]]
    else:
        choices = [[layer] * len(by_layer) for layer in by_layer[0] if all(layer in layers for layers in by_layer)]
    for chosen in choices:
        models = [layers[layer] for layers, layer in zip(by_layer, chosen, strict=True)]
        common = [lang for lang in models[0] if all(lang in rows for rows in models)]
        for lang in common:
            if len({rows[lang].n for rows in models}) > 1:
                counts = ", ".join(f"{name} {rows[lang].n}" for name, rows in zip(results, models, strict=True))
                raise UserError(f"{data}, {lang}: not the same pairs ({counts}): evaluate on the same file")
        if common:
            label = "/".join(map(str, dict.fromkeys(chosen)))
            yield label, [[rows[lang] for lang in common] for rows in models]


def _compare(table: Table, data: str, layer: str, parts: list[list[RetrievalRow]], only_cross: bool) -> None:
    models = [fmean(fmean((row.forward, row.backward)) for row in rows) for rows in parts]
    trigrams = fmean(fmean((row.trigram_forward, row.trigram_backward)) for row in parts[0])
    chance = fmean(row.chance for row in parts[0])
    label = f"{len(parts[0])}" + (" cross-script" if only_cross else "")
    table.add_row(data, layer, label, *(f"{value:.3f}" for value in (*models, trigrams, chance)))


def _table(data: str, layers: list[list[RetrievalRow]]) -> Table:
    how = f"{layers[0][0].pooling} pooling{', projected' * layers[0][0].projected}"
    title = f"{Path(data).name}: accuracy@1, {how}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("language", no_wrap=True)
    for heading in ("pairs", "forward", "backward", "trigram\nforward", "trigram\nbackward", "chance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rows in layers:
        if len(layers) == 1:
            for row in rows:
                _add(table, row.lang + (" *" if row.cross_script else ""), [row])
            table.add_section()
        _add(table, f"mean of {len(rows)}", rows)
        cross_script = [row for row in rows if row.cross_script]
        if cross_script:
            _add(table, f"mean of {len(cross_script)} *", cross_script)
    table.caption = "* cross-script: another script than the pivot's; trigram: untrained TF-IDF on the same pairs"
    return table


def _add(table: Table, label: str, rows: Sequence[RetrievalRow]) -> None:
    means = [fmean(getattr(row, name) for row in rows) for name in _ACCURACIES]
    pairs = str(rows[0].n) if len(rows) == 1 else ""
    table.add_row(str(rows[0].layer), label, pairs, *(f"{mean:.3f}" for mean in means))
