"""Explains why a step was not applied: which losses were not finite, on which ranks and in which languages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.objective import Report
from infoxlm_ds.xlco import Representations

SHOWN = 4  # at most so many lanes in a message, and languages of a lane


def find_faults(
    numbers: Sequence[int],
    lanes: Sequence[JointBatch],
    reports: Sequence[Report],
    representations: Sequence[Representations],
) -> list[str]:
    """The losses of the step that are not finite, with task, rank, lane and languages. Every rank gets the same list.
    It is empty if only gradients are not finite. Collective."""
    own = [
        f"{task} on rank {dist.rank()}, lane {number}{languages}"
        for number, lane, report, of_lane in zip(numbers, lanes, reports, representations, strict=True)
        for task, languages in _faults(lane, report, of_lane).items()
    ]
    return [fault for faults in dist.gather_objects(own) for fault in faults]


def explain(faults: Sequence[str], scale: float, next_scale: float) -> str:
    """One line about a step that was not applied. `scale`: its loss scale, 1 without fp16; `next_scale`: the next
    step's."""
    line = f"loss not finite: {_some(faults, '; ')}" if faults else "all losses are finite, gradients are not"
    if scale == next_scale == 1:
        return line
    line += f"; loss scale {scale:g}, now {next_scale:g}"
    return line if faults else f"{line}: fp16 searches its scale, which is normal at the start and sometimes later"


def _faults(lane: JointBatch, report: Report, own: Representations) -> dict[str, str]:
    """The tasks of a lane whose losses are not finite, with the languages of the items that cause it."""
    blamed: dict[str, Iterable[str]] = {}
    sequences = lane.masked_sequences.cpu().numpy()
    bad = _not_finite(report.masked[:, None])
    names = np.concatenate([lane.names.get(task, np.zeros(0, str)) for task in lane.masked_parts])
    for task, part in lane.masked_parts.items():
        if bad[part].any():
            blamed[task] = names[sequences[part][bad[part]]]
    loss, sides = report.sums.get("xlco/loss", 0.0), [_not_finite(side) for side in own[:2] if len(side)]
    if not np.isfinite(float(loss)) or any(side.any() for side in sides):
        items = np.concatenate([np.flatnonzero(side) for side in sides])  # no items: another lane causes it
        blamed["xlco"] = lane.names["xlco"][items].ravel()
    return {task: _languages(names) for task, names in blamed.items()}


def _languages(names: Iterable[str]) -> str:
    different = sorted(set(map(str, names)))
    return f" ({_some(different, ', ')})" if different else ""


def _some(parts: Sequence[str], between: str) -> str:
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return between.join(parts[:SHOWN]) + more


def _not_finite(rows: Tensor) -> np.ndarray:
    """Whether each row of [n, D] holds a number that is not finite, [n]."""
    flags: np.ndarray = (~torch.isfinite(rows)).flatten(1).any(1).cpu().numpy()
    return flags
