"""The progress line of a run: the most important figures first, and as many as the screen has space for."""

from __future__ import annotations

from collections.abc import Iterator

from infoxlm_ds.monitor.meters import Scalars

LOSSES = {"mmlm/loss": "mmlm", "tlm/loss": "tlm", "xlco/loss": "xlco", "xlco/accuracy": "acc"}


def progress_line(step: int, steps: int, values: Scalars, seconds_left: float, width: int | None = None) -> str:
    """`width`: characters of the screen; None: everything."""
    line = f"step {step}/{steps}"
    for part in _parts(values, seconds_left):
        if width is not None and len(line) + 1 + len(part) > width:
            break
        line = f"{line} {part}"
    return line


def _parts(values: Scalars, seconds_left: float) -> Iterator[str]:
    """The figures, the most important first."""
    for name, label in LOSSES.items():
        if name in values:
            yield f"{label} {short(values[name])}"
    yield f"left {clock(seconds_left)}"
    if skipped := values.get("optimizer/skipped_steps"):
        yield f"skipped {skipped:.0f}"
    yield f"tok/s {short(values['speed/tokens'])}"
    if (filled := values.get("queue/filled", 1.0)) < 1:
        yield f"queue {filled:.0%}"
    if "speed/mfu" in values:
        yield f"mfu {values['speed/mfu']:.1%}"
    yield f"data wait {values['speed/data_wait_share']:.1%}"


def short(value: float) -> str:
    """A figure in few characters."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
