"""A report of runs as one HTML page, without scripts and without anything to load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from infoxlm_ds.atomic import write_file
from infoxlm_ds.checkpoint.identity import leaves
from infoxlm_ds.config import Probe, UserError
from infoxlm_ds.monitor.tags import TASKS
from infoxlm_ds.publish.report import svg
from infoxlm_ds.publish.report.model import Seen, look
from infoxlm_ds.publish.report.read import Run, planned_shares, read_run, settings, warnings_of
from infoxlm_ds.publish.report.svg import Series

MARK = "<!-- infoxlm report -->"


class Chart(NamedTuple):
    """Scalars that share an axis, by name and label. `unit`: of the axis; `about`: how to read it."""

    title: str
    unit: str
    lines: dict[str, str]
    about: str


LOSSES = Chart("Loss", "nats", {f"{task}/loss": name for task, name in TASKS.items()}, "Lower is better.")
BOUNDS = Chart(
    "Bound on mutual information",
    "nats",
    {f"{task}/information_bound": name for task, name in TASKS.items()},
    "Log of the number of choices minus the loss. Higher is better.",
)
RETRIEVAL = Chart(
    "Held-out retrieval", "accuracy@1", {"probe/mean": "mean", "probe/trigram_mean": "trigrams"}, "Higher is better."
)
HEALTH = (
    Chart("Contrast: translations found in a batch", "accuracy@1", {"xlco/accuracy": "accuracy"}, "Rises."),
    Chart("Contrast: logits", "logit", {"xlco/positive": "translation", "xlco/hardest": "hardest negative"}, "Apart."),
    Chart("Dimensions in use", "effective rank", {"xlco/effective_rank": "pairs"}, "Well above 1; 1 is a collapse."),
    Chart("Geometry", "", {"xlco/alignment": "alignment", "xlco/uniformity": "uniformity"}, "Both fall."),
    Chart("Queue: share that is filled", "share", {"queue/filled": "filled"}, "It is read once it is full."),
    Chart("Queue: mean age of a key", "steps", {"queue/mean_age": "age"}, "Steady once the queue is full."),
    Chart("Key encoder: weights that change in a step", "share", {"momentum/changed_share": "changed"}, "Above 0."),
    Chart("Key encoder: distance to the trained weights", "share of their norm", {"momentum/distance": "distance"}, ""),
)
TRAINING = (
    Chart("Gradient norm", "norm", {"optimizer/gradient_norm": "norm"}, "Before clipping."),
    Chart("Learning rate", "", {"optimizer/learning_rate": "learning rate"}, ""),
    Chart("Steps that were not applied", "steps since the last line", {"optimizer/skipped_steps": "skipped"}, ""),
    Chart("Speed", "tokens a second", {"speed/tokens": "tokens"}, "All ranks together."),
    Chart("Model FLOPs utilisation", "share of the peak", {"speed/mfu": "MFU"}, ""),
    Chart("Waiting for data", "share of the time", {"speed/data_wait_share": "waiting"}, "Below .05 is well."),
    Chart("Peak memory of rank 0", "GiB", {"memory/peak": "peak"}, ""),
    Chart("Time that a checkpoint stops training", "seconds", {"checkpoint/blocked": "blocked"}, ""),
)


@dataclass(frozen=True)
class Part:
    """A section of the page. `body` is HTML."""

    title: str
    body: str


def write_report(
    folders: Sequence[Path], out: Path, data: Path | None = None, pivot: str = "en", with_model: bool = True
) -> None:
    """Write the report of runs to `out`. `data`: parallel text to look at the models with; None: that of each run's
    probe. UserError if a folder is no run, or if `out` would overwrite something else."""
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"{out}: the last argument is the page to write and ends in .html")
    if out.is_dir() or (out.is_file() and MARK not in out.read_text(encoding="utf-8", errors="replace")[:200]):
        raise UserError(f"{out} is there and is no report: choose another name")
    runs = [read_run(folder) for folder in folders]
    _name_apart(runs)
    parts = [_overview(runs), _curves(runs), _figures("Contrast, queue and key encoder", HEALTH, runs)]
    parts += [_models(runs, data, pivot)] if with_model else []
    parts += [_languages(runs), _figures("Training", TRAINING, runs), _checkpoints(runs), _configuration(runs)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, _page(runs, [part for part in parts if part.body]))


def _name_apart(runs: list[Run]) -> None:
    """Runs whose folders have one name are called by their paths."""
    names = [run.name for run in runs]
    for number, run in enumerate(runs):
        if names.count(run.name) > 1:
            runs[number] = replace(run, name=str(run.folder))


def _overview(runs: Sequence[Run]) -> Part:
    rows = []
    for run in runs:
        last = run.history.last("loss") or {}
        losses = [_value(last.get(f"{task}/loss")) for task in TASKS]
        best = f"{run.best[1]:.3f} at step {run.best[0]:,}" if run.best else "not measured"
        spent = f"{run.history.tokens / 1e6:,.1f}M", f"{run.history.hours:.2f}"
        rows.append((run.name, f"{run.last_step:,}", *losses, best, *spent))
    head = ("run", "step", *(f"{name} loss" for name in TASKS.values()), "best retrieval", "tokens", "hours")
    body = svg.table(head, rows)
    for run in runs:
        found = [f"<li>{escape(text)}</li>" for text in warnings_of(run)]
        name = f"{escape(run.name)}: " if len(runs) > 1 else ""
        body += f'<p class="note">{name}To know first:</p><ul>{"".join(found)}</ul>' if found else ""
    return Part("Overview", body)


def _curves(runs: Sequence[Run]) -> Part:
    figures = [_chart(LOSSES, runs), _chart(BOUNDS, runs), _retrieval(runs)]
    return Part("Losses, bounds and retrieval", _grid(figures))


def _retrieval(runs: Sequence[Run]) -> str:
    """The mean beside the trigrams and, of one run, each language as a faint line with its numbers in the table."""
    if len(runs) > 1:
        return _chart(RETRIEVAL, runs)
    history, (run,) = runs[0].history, runs
    series = [Series("mean", *history.series("probe/mean"), 0, "thick")]
    series.append(Series("trigrams, untrained", *history.series("probe/trigram_mean"), 1, "dashed"))
    languages = run.languages()
    for number, language in enumerate(languages):
        kind = "normal" if len(languages) <= 6 else "faint"
        series.append(Series(language, *history.series(f"probe/{language}"), number + 2, kind))
    title = RETRIEVAL.title + (", thin lines are languages" if len(languages) > 6 else "")
    figure = svg.lines(title, RETRIEVAL.unit, series, RETRIEVAL.about)
    probe = run.recipe.probe if run.recipe else None
    if figure and probe:
        figure += f'<p class="note">{escape(Path(probe.data).name)}, at most {probe.pairs} pairs with {probe.pivot} a '
        figure += f"language, mean of both directions; chance is 1 / {probe.pairs}.</p>"
    return figure


def _figures(title: str, charts: Sequence[Chart], runs: Sequence[Run]) -> Part:
    return Part(title, _grid([_chart(chart, runs) for chart in charts]))


def _chart(chart: Chart, runs: Sequence[Run]) -> str:
    """One figure; of several runs, one for each scalar, with a line for each run."""
    if len(runs) == 1:
        lines = chart.lines.items()
        series = [Series(label, *runs[0].history.series(name), i) for i, (name, label) in enumerate(lines)]
        return svg.lines(chart.title, chart.unit, [one for one in series if one.steps], chart.about)
    figures = []
    for name, label in chart.lines.items():
        series = [Series(run.name, *run.history.series(name), number) for number, run in enumerate(runs)]
        title = chart.title if len(chart.lines) == 1 else f"{chart.title}: {label}"
        figures.append(svg.lines(title, chart.unit, [one for one in series if one.steps], chart.about))
    return "".join(figures)


def _models(runs: Sequence[Run], data: Path | None, pivot: str) -> Part:
    body = ""
    for run in runs:
        if len(runs) > 1:
            body += f"<h3>{escape(run.name)}</h3>"
        probe = Probe(data=data, pivot=pivot) if data else run.recipe.probe if run.recipe else None
        if not run.checkpoints:
            body += '<p class="note">There is no checkpoint yet.</p>'
        elif probe is None:
            body += (
                '<p class="note">The recipe has no probe: give parallel text with --data FILE.jsonl, and this '
                "section shows retrieval by layer and language, and a map of sentences.</p>"
            )
        else:
            body += _seen(look(run, probe))
    return Part("What the model does", body)


def _seen(seen: Seen) -> str:
    layers = ["trigrams", "embeddings", *(f"layer {n}" for n in range(1, len(seen.accuracy) - 1)), "sentence vector"]
    values = np.vstack([seen.trigrams, seen.accuracy])
    other = seen.languages[seen.shown]
    figures = [
        svg.heat_map(
            "Accuracy@1 in percent, by layer and language",
            values[::-1],
            layers[::-1],
            seen.languages,
            f"On {seen.data}, at most {seen.pairs} pairs with {seen.pivot} a language, mean of both directions.",
            figures=True,
        ),
        svg.heat_map(
            f"Cosine of sentence vectors: {seen.pivot} down, {other} across",
            seen.matrix,
            numbers := [str(n + 1) for n in range(len(seen.matrix))],
            numbers,
            "Sentence i and its translation i are on the diagonal, which should be dark, and the rest light.",
            figures=False,
        ),
    ]
    for name, (points, names) in seen.maps.items():
        about = "Translations lie together where languages mix; where each has a place of its own, they do not."
        figures.append(svg.scatter(f"Sentence vectors by language, {seen.how}: {name}", points, names, about))
    return _grid(figures)


def _languages(runs: Sequence[Run]) -> Part:
    body = ""
    for run in runs:
        counted, planned = run.history.items, planned_shares(run)
        if not counted:
            continue
        totals = {task: max(sum(counts.values()), 1) for task, counts in counted.items()}
        everything = sorted(set[str]().union(*counted.values(), *planned.values()))
        head = ["language"]
        for task in counted:
            head += [f"{TASKS[task]} read", *([f"{TASKS[task]} planned"] if task in planned else [])]
        rows = []
        for code in everything:
            row = [code]
            for task in counted:
                row.append(f"{counted[task][code] / totals[task]:.2%}")
                row += [f"{planned[task].get(code, 0.0):.2%}"] if task in planned else []
            rows.append(row)
        title = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        body += title + svg.table(head, rows, "shares of languages")
    note = '<p class="note">Shares of the texts, by task. A pair counts for both its languages.</p>'
    return Part("Languages", note + body if body else "")


def _checkpoints(runs: Sequence[Run]) -> Part:
    rows = []
    for run in runs:
        scores = dict(zip(*run.history.series("probe/mean"), strict=True))
        for saved in run.checkpoints:
            best = " (best)" * (run.best is not None and run.best[0] == saved.step)
            score = f"{scores[saved.step]:.3f}{best}" if saved.step in scores else ""
            rows.append((run.name, f"{saved.step:,}", saved.written, f"{saved.bytes / 1e6:,.1f}", score))
    return Part("Checkpoints", svg.table(("run", "step", "written", "MB", "retrieval"), rows) if rows else "")


def _configuration(runs: Sequence[Run]) -> Part:
    body, trees = "", [dict(leaves(settings(run))) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in trees for key in tree) if key != "run"]
    different = [key for key in keys if len({str(tree.get(key, "")) for tree in trees}) > 1]
    if len(runs) > 1:
        rows = [(key, *(tree.get(key, "not set") for tree in trees)) for key in different]
        body += "<p>What differs:</p>" + svg.table(("key", *(run.name for run in runs)), rows) if rows else ""
        body += "" if rows else "<p>The recipes are equal.</p>"
    for run in runs:
        text = yaml.safe_dump(settings(run), sort_keys=False, allow_unicode=True)
        block = f'<pre class="scroll" tabindex="0">{escape(text)}</pre>'
        body += svg.details(block, f"Recipe of {escape(run.name)}") if run.recipe else ""
    return Part("Configuration", body)


def _grid(figures: Iterable[str]) -> str:
    body = "".join(f"<div>{figure}</div>" for figure in figures if figure)
    return f'<div class="figures">{body}</div>' if body else ""


def _value(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _page(runs: Sequence[Run], parts: Sequence[Part]) -> str:
    title = escape(", ".join(run.name for run in runs))
    links = "".join(f'<a href="#s{i}">{escape(part.title)}</a>' for i, part in enumerate(parts))
    sections = "".join(f'<section id="s{i}"><h2>{escape(p.title)}</h2>{p.body}</section>' for i, p in enumerate(parts))
    return (
        f'<!doctype html>{MARK}<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><header><h1>{title}</h1><nav>{links}</nav></header><main>{sections}</main></body></html>\n"
    )


STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--card:#f6f8fa;--rule:#d0d7de;
--c0:#0072b2;--c1:#b35900;--c2:#007a5a;--c3:#a8427d;--c4:#56606a;--c5:#6a51a3;--c6:#8a6d00;--c7:#c4302b}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--paper:#0d1117;--card:#161b22;--rule:#30363d;
--c0:#58a6ff;--c1:#f0a04b;--c2:#4fc79a;--c3:#e69ac4;--c4:#b0bac4;--c5:#b9a4ec;--c6:#e3c65b;--c7:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1200px;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.2rem;border-bottom:1px solid var(--rule);margin-top:2rem}
h3{font-size:1rem}nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem}a{color:var(--c0)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:1rem;align-items:start}
figure{margin:0 0 1rem;padding:.7rem;background:var(--card);border:1px solid var(--rule);border-radius:6px}
figcaption{font-weight:600}svg{max-width:100%;height:auto}figure>svg{width:100%;display:block}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}.axis{fill:var(--soft)!important}
.grid{stroke:var(--rule);stroke-width:1}.frame{fill:none;stroke:var(--rule)}
.line{fill:none;stroke-width:1.8}.thick{stroke-width:3.2}.faint{stroke-width:1;opacity:.55}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
.line{stroke:var(--c)}.mark{fill:var(--c);fill-opacity:.75}.ring{fill:none;stroke:var(--c);stroke-width:1.5}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0;padding:0;font-size:.85rem}
.legend svg{vertical-align:middle;margin-right:.3rem}.note{color:var(--soft);font-size:.9rem}
.scroll{overflow:auto;max-width:100%;max-height:30rem}
table{border-collapse:collapse;font-size:.85rem}th,td{padding:.15rem .6rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--rule)}th[scope=row],th:first-child{text-align:left}
pre{font-size:.8rem;background:var(--card);padding:.6rem}summary{cursor:pointer;font-size:.9rem;color:var(--soft)}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
@media(max-width:600px){figure>svg[viewBox^="0 0 640"] text{font-size:18px}}
@media print{nav,details{display:none}}
"""
