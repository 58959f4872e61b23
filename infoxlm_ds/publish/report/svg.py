"""Figures of a report as SVG, drawn for HTML: colours come from the page's CSS, so they follow light and dark.

Each has a title and a description for those who do not see it, and its numbers in a table below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40  # margins, which hold the labels of the axes
POINTS, ROWS = 300, 40  # of a line, and of its table: more are thinned
DASHES = ("", "7 4", "2 3", "9 3 2 3")
COLOURS = 8
LOW, HIGH = np.array([222, 235, 247.0]), np.array([8, 48, 107.0])

Floats = npt.NDArray[np.floating]
_ids = count()


@dataclass(frozen=True)
class Series:
    """A line: `steps` [n] rise. `style`: number of its colour; `kind`: normal, thick, faint or dashed."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: int = 0
    kind: str = "normal"


def lines(title: str, unit: str, series: Sequence[Series], about: str = "") -> str:
    """A chart of values over steps, with a legend. `unit`: of the values; `about`: a sentence for the description."""
    thinned = [thin(one, POINTS) for one in series if len(one.steps)]
    values = np.array([v for one in thinned for v in one.values if math.isfinite(v)])
    if not len(values):
        return ""
    steps = [s for one in thinned for s in one.steps]
    x, y = _Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT), _Axis.around(values, HEIGHT - BOTTOM, TOP)
    body = [_grid(x, y, "step", unit)]
    for one in thinned:
        body += [
            f'<polyline class="line c{one.style % COLOURS} {one.kind}" style="stroke-dasharray:{_dash(one)}" points="'
            f'{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in part)}"/>'
            for part in _unbroken(one)
        ]
    shown = [one for one in series if len(one.values) and one.kind != "faint"]
    said = "; ".join(f"{one.label} ends at {_figure(one.values[-1])}" for one in shown)
    return _figure_of(title, about, body, _legend(shown) + _numbers(series), said=f"{said}.")


def heat_map(title: str, values: Floats, rows: Sequence[str], columns: Sequence[str], about: str, figures: bool) -> str:
    """Cells of `values` [R, C], from 0 to 1. `figures`: cells show them in percent."""
    cell = 34 if figures else 15
    left, below = 8 + 7 * max(map(len, rows)), 12 + 7 * max(map(len, columns))
    body = []
    for row, column in np.ndindex(values.shape):
        px, py, value = left + cell * column, cell * row, float(values[row, column])
        name = f"{rows[row]}, {columns[column]}: {value:.3f}"
        body.append(
            f'<rect x="{px}" y="{py}" width="{cell - 1}" height="{cell - 1}" fill="{_shade(value)}">'
            f"<title>{escape(name)}</title></rect>"
        )
        if figures and math.isfinite(value):
            ink = "#fff" if value > 0.45 else "#000"
            middle = f'x="{px + cell / 2}" y="{py + cell / 2 + 4}"'
            body.append(f'<text {middle} text-anchor="middle" style="fill:{ink}">{100 * value:.0f}</text>')
    for number, label in enumerate(rows):
        body.append(f'<text x="{left - 6}" y="{cell * (number + 0.5) + 4}" text-anchor="end">{escape(label)}</text>')
    bottom = cell * len(rows) + 8
    for number, label in enumerate(columns):
        px = left + cell * (number + 0.5) + 4
        place = f'x="{px}" y="{bottom}" transform="rotate(-90 {px} {bottom})" text-anchor="end"'
        body.append(f"<text {place}>{escape(label)}</text>")
    size = left + cell * len(columns) + 4, cell * len(rows) + below
    cells = [(row, *(f"{v:.3f}" for v in of_row)) for row, of_row in zip(rows, values.tolist(), strict=True)]
    return _figure_of(title, about, body, details(table(("", *columns), cells)), size)


def scatter(title: str, points: Floats, names: Sequence[str], about: str) -> str:
    """Points [n, 2] in the colour and shape of their names [n]."""
    known = list(dict.fromkeys(names))
    low, high = points.min(0), points.max(0)
    size = 300
    places = (points - low) / np.maximum(high - low, 1e-9) * (size - 20) + 10
    body = [f'<rect class="frame" x="0.5" y="0.5" width="{size - 1}" height="{size - 1}"/>']
    for (px, py), name in zip(places.tolist(), names, strict=True):
        number = known.index(name)
        body.append(f"{_mark(px, size - py, number)}<title>{escape(name)}</title></path>")
    legend = "".join(
        f'<li><svg width="14" height="14" aria-hidden="true">{_mark(7, 7, number)}</path></svg>{escape(name)}</li>'
        for number, name in enumerate(known)
    )
    cells = [(name, f"{x:.3f}", f"{y:.3f}") for name, (x, y) in zip(names, points.tolist(), strict=True)]
    more = f'<ul class="legend">{legend}</ul>' + details(table(("language", "x", "y"), cells))
    return _figure_of(title, about, body, more, (size, size))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table in a region that scrolls, also by keyboard."""
    cells = "".join(
        "<tr>" + "".join(f"<{'th scope=row' if not i else 'td'}>{_cell(c)}" for i, c in enumerate(row)) for row in rows
    )
    heads = "".join(f"<th scope=col>{_cell(name)}" for name in head)
    name = escape(caption or " ".join(map(str, head)).strip() or "numbers")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>'
        f"<thead><tr>{heads}<tbody>{cells}</table></div>"
    )


def details(content: str, summary: str = "Numbers") -> str:
    """HTML that is folded behind a summary."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def thin(series: Series, most: int) -> Series:
    """At most so many points: the medians of equal parts, without values that are not finite."""
    if len(series.steps) <= most:
        return series
    parts = zip(np.array_split(series.steps, most), np.array_split(series.values, most), strict=True)
    steps, values = [], []
    for of_steps, of_values in parts:
        finite = of_values[np.isfinite(of_values)]
        steps.append(float(np.median(of_steps)))
        values.append(float(np.median(finite)) if len(finite) else math.nan)
    return Series(series.label, steps, values, series.style, series.kind)


@dataclass(frozen=True)
class _Axis:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Floats, start: float, end: float) -> _Axis:
        """The axis of these values, with some room. Outliers beyond five times the inner range are cut off."""
        low, high = float(values.min()), float(values.max())
        inner_low, inner_high = np.quantile(values, (0.02, 0.98)).tolist()
        reach = 5 * (inner_high - inner_low)
        if reach:
            low, high = max(low, inner_low - reach), min(high, inner_high + reach)
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(low - room if low < 0 or low > room else 0.0, high + room, start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Some round values."""
        span = (self.high - self.low) or 1.0
        step = 10 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [round(number * step, 12) for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(x: _Axis, y: _Axis, below: str, beside: str) -> str:
    parts = []
    for value in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_figure(value)}</text>')
    under = f'y="{HEIGHT - BOTTOM + 16}" text-anchor="middle"'
    parts += [f'<text x="{x(value):.1f}" {under}>{_figure(value)}</text>' for value in x.ticks()]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{below}</text>')
    parts.append(
        f'<text class="axis" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(beside)}</text>"
    )
    return "".join(parts)


def _unbroken(series: Series) -> Iterable[list[tuple[float, float]]]:
    """The parts of a line between values that are not finite."""
    part: list[tuple[float, float]] = []
    for step, value in zip(series.steps, series.values, strict=True):
        if math.isfinite(value):
            part.append((step, value))
        elif part:
            yield part
            part = []
    if part:
        yield part


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" '
        f'class="line c{one.style % COLOURS} {one.kind}" style="stroke-dasharray:{_dash(one)}"/></svg>'
        f"{escape(one.label)}</li>"
        for one in series
    )
    return f'<ul class="legend">{items}</ul>'


def _numbers(series: Sequence[Series]) -> str:
    """All values by step, thinned to ROWS rows."""
    known: dict[float, dict[str, float]] = {}
    for one in series:
        for step, value in zip(one.steps, one.values, strict=True):
            known.setdefault(step, {})[one.label] = value
    steps = sorted(known)
    if len(steps) > ROWS:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, ROWS).round().astype(int)]
    labels = [one.label for one in series]
    rows = [
        (f"{step:,.0f}", *(_figure(known[step][label]) if label in known[step] else "" for label in labels))
        for step in steps
    ]
    return details(table(("step", *labels), rows))


def _figure_of(
    title: str,
    about: str,
    body: Sequence[str],
    more: str,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    said: str = "",
) -> str:
    """`about`: how to read it, for all; `said`: what the picture shows, for those who do not see it."""
    number = next(_ids)
    labelled = f"t{number} d{number}"
    width, height = (round(side) for side in size)
    note = f'<p class="note">{escape(about)}</p>' if about else ""
    small = f' style="max-width:{width}px"' if width < WIDTH else ""
    return (
        f'<figure tabindex="0"{small}><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{labelled}">'
        f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(f"{about} {said}".strip())}</desc>'
        f"{''.join(body)}</svg>{note}{more}</figure>"
    )


def _mark(x: float, y: float, number: int) -> str:
    """The start of a mark's path: a disc, a square, a triangle or a diamond, then the same as rings."""
    shape = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z",
        f"M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
    )[number % 4]
    return f'<path class="mark c{number % COLOURS}{" ring" * (number // 4 % 2)}" d="{shape}">'


def _dash(series: Series) -> str:
    if series.kind == "dashed":
        return "5 4"
    return DASHES[series.style % len(DASHES)] if series.kind == "normal" else ""


def _shade(value: float) -> str:
    if not math.isfinite(value):
        return "#999"
    mixed = LOW + min(max(value, 0.0), 1.0) * (HIGH - LOW)
    return f"#{''.join(f'{round(part):02x}' for part in mixed.tolist())}"


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.1e}"


def _cell(value: object) -> str:
    return escape(str(value))
