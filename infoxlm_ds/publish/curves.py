"""Draws a run's curves as one picture: losses, bounds on mutual information, held-out retrieval, speed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from infoxlm_ds.monitor.history import History
from infoxlm_ds.monitor.tags import TASKS

CURVES = "curves.png"
MISSING = "pip install 'infoxlm-ds[report]'"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_curves(history: History, path: Path) -> None:
    """Write the picture as PNG. matplotlib must be installed."""
    from matplotlib.figure import Figure  # without pyplot: no windows, no global state

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    losses, bounds, probe, speed = figure.subplots(2, 2).ravel()
    for task, label in TASKS.items():
        _line(losses, history, f"{task}/loss", label)
        _line(bounds, history, f"{task}/information_bound", label)
    for name in sorted({name for row in history.rows for name in row if name.startswith("probe/")}):
        _line(probe, history, name, name.removeprefix("probe/"), thick=name == "probe/mean")
    _line(speed, history, "speed/tokens", "tokens a second")
    titles = ("loss (nats)", "bound on mutual information (nats)", "held-out retrieval, accuracy@1", "tokens a second")
    for axes, title in zip((losses, bounds, probe, speed), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if axes.lines and axes is not speed:
            axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90, format="png", metadata={"Software": None})


def _line(axes: object, history: History, name: str, label: str, thick: bool = False) -> None:
    steps, values = history.series(name)
    if steps:
        axes.plot(steps, values, label=label, linewidth=2.4 if thick else 1.1)  # type: ignore[attr-defined]
