"""The results of all seeds: one table and one JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from infoxlm_ds.atomic import write_file
from infoxlm_ds.evaluation.finetune.files import ENGLISH
from infoxlm_ds.evaluation.finetune.settings import Settings

FILE = "results.json"


def with_means(test: dict[str, float], trained: Sequence[str] = (ENGLISH,)) -> dict[str, float]:
    """A seed's scores by language, `avg` over all languages and `gap`: English minus the mean of the others (the
    transfer gap of Hu et al. 2020). Without English, the languages of training take its place. If one of both sides is
    empty, there is no gap."""
    source = [ENGLISH] if ENGLISH in test else [language for language in trained if language in test]
    others = [value for language, value in test.items() if language not in source]
    means = {"avg": fmean(test.values())}
    if others and source:
        means["gap"] = fmean(test[language] for language in source) - fmean(others)
    return test | means


def summarize(settings: Settings, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, by metric and column, and the results of each seed. Scores are from 0 to
    1; the deviation (of a sample) is 0 for one seed."""
    columns: dict[str, dict[str, list[float]]] = {}
    for metric in settings.of_task.metrics:
        rows = [with_means(result["test"][metric], settings.train_languages) for result in results]
        columns[metric] = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "task": settings.task,
        "model": str(settings.model),
        "select": settings.select,
        "train_languages": list(settings.train_languages),
        "mean": {metric: {name: fmean(x) for name, x in found.items()} for metric, found in columns.items()},
        "std": {metric: {name: _deviation(x) for name, x in found.items()} for metric, found in columns.items()},
        "seeds": results,
    }


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def write_results(summary: dict[str, Any], out: Path) -> None:
    """Write the summary as JSON into the result folder."""
    write_file(out / FILE, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def print_results(summary: dict[str, Any], console: Console) -> None:
    """Print one row, with languages as columns: scores in percent, and their deviation over seeds below. A long row is
    not cut, however wide the terminal is."""
    count, metrics = len(summary["seeds"]), " / ".join(summary["mean"])
    names = list(next(iter(summary["mean"].values())))
    rows = [["model", *names]]
    for title, values in ((Path(summary["model"]).name, summary["mean"]), ("±", summary["std"]))[: min(count, 2)]:
        rows.append([title, *(" / ".join(f"{100 * found[name]:.1f}" for found in values.values()) for name in names)])
    source = "English" if ENGLISH in names else ", ".join(summary["train_languages"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{summary['task']}: {metrics} of the test files in percent, {count} seed{'s' * (count > 1)}"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"gap: {source} minus the mean of the other languages"] * ("gap" in names)
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
