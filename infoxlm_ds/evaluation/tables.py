"""Retrieval results: a table for each file, and JSON."""

import json
from collections.abc import Sequence
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


def print_comparison(results: dict[str, Sequence[RetrievalRow]], console: Console) -> None:
    """Print one table of several models on the same files, a column for each model: accuracy@1, mean of both directions
    and of all languages."""
    table = Table(title="mean accuracy@1, both directions", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("data", "languages"):
        table.add_column(heading, no_wrap=True)
    for heading in (*results, "trigrams", "chance"):
        table.add_column(heading, justify="right")
    first = next(iter(results.values()))
    for data in dict.fromkeys(row.data for row in first):
        for only_cross in (False, True):
            parts = [
                [r for r in rows if r.data == data and (r.cross_script or not only_cross)] for rows in results.values()
            ]
            if all(parts):
                _compare(table, Path(data).name.split(".jsonl")[0], parts, only_cross)
    console.print(table)


def _compare(table: Table, data: str, parts: list[list[RetrievalRow]], only_cross: bool) -> None:
    models = [fmean(fmean((row.forward, row.backward)) for row in rows) for rows in parts]
    trigrams = fmean(fmean((row.trigram_forward, row.trigram_backward)) for row in parts[0])
    chance = fmean(row.chance for row in parts[0])
    label = f"{len(parts[0])}" + (" cross-script" if only_cross else "")
    table.add_row(data, label, *(f"{value:.3f}" for value in (*models, trigrams, chance)))


def _table(data: str, layers: list[list[RetrievalRow]]) -> Table:
    title = f"{Path(data).name}: accuracy@1, {layers[0][0].pooling} pooling"
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
