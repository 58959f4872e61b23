"""Nearest neighbours of sentence vectors, and scores that compare a pair's cosine with those of its neighbours.

Some texts lie near to everything (hubs). A margin score compares the cosine of a pair with the mean cosine of each
side to its k nearest neighbours on the other side (Artetxe and Schwenk, 2019, section 3.2; CSLS: Conneau et al., 2018,
section 2.3).

Legend: n queries, m keys, D width, k neighbours.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from infoxlm_ds.evaluation.progress import blocks

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float32] | npt.NDArray[np.float16]
Indices = npt.NDArray[np.int64]
Score = Literal["cosine", "ratio", "distance", "csls"]
SCORES: tuple[Score, ...] = get_args(Score)
NEIGHBOURS: dict[Score, int] = {"cosine": 0, "ratio": 4, "distance": 4, "csls": 10}  # k, as in the two papers
CHUNK = 4096
Numbers = TypeVar("Numbers", Vectors, Tensor)


def nearest(
    query: Rows,
    key: Rows,
    k: int,
    device: torch.device | None = None,
    chunk: int = CHUNK,
    below: Vectors | None = None,
    what: str = "",
) -> tuple[Vectors, Indices]:
    """Cosines and places of the k nearest keys of each query, the nearest first: both [n, min(k, m)]. `query` [n, D]
    and `key` [m, D] are L2-normalised, and may lie in a memory-mapped file. The search is exact. Memory beside the
    result: chunk x chunk scores.

    `below` [n]: only keys whose cosine is below this count; a place without a key has the cosine -inf. `what`: the name
    of a progress that is shown."""
    k = min(k, len(key))
    values, places = np.empty((len(query), k), np.float32), np.empty((len(query), k), np.int64)
    for rows in blocks(len(query), chunk, what):
        part, limit = _on(device, query[rows]), None if below is None else _on(device, below[rows])[:, None]
        best, where = part.new_full((len(part), 0), 0.0), torch.zeros((len(part), 0), dtype=torch.int64, device=device)
        for first in range(0, len(key), chunk):
            scores = part @ _on(device, key[first : first + chunk]).T
            if limit is not None:
                scores = scores.masked_fill(scores >= limit, -torch.inf)
            found = scores.topk(min(k, scores.shape[1]), dim=1)
            best, where = torch.cat([best, found.values], 1), torch.cat([where, found.indices + first], 1)
            kept = best.topk(min(k, best.shape[1]), dim=1)
            best, where = kept.values, where.gather(1, kept.indices)
        values[rows], places[rows] = best.cpu().numpy(), where.cpu().numpy()
    return values, places


def _on(device: torch.device | None, rows: Rows) -> Tensor:
    """A copy on the device, in fp32. torch does not take arrays that cannot be written, such as mapped files."""
    return torch.from_numpy(np.array(rows)).to(device).float()


def rescored(score: Score, cosine: Numbers, query: Numbers, key: Numbers) -> Numbers:
    """The scores of pairs by their cosines. `query` and `key`: the mean cosines of each side to its nearest neighbours
    on the other side, in shapes that broadcast to that of `cosine`."""
    if score == "cosine":
        return cosine
    mean: Any = (query + key) / 2
    return cosine / mean if score == "ratio" else cosine - mean if score == "distance" else 2 * (cosine - mean)
