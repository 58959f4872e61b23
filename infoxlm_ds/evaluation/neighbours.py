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

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Score = Literal["cosine", "ratio", "distance", "csls"]
SCORES: tuple[Score, ...] = get_args(Score)
NEIGHBOURS: dict[Score, int] = {"cosine": 0, "ratio": 4, "distance": 4, "csls": 10}  # k, as in the two papers
CHUNK = 4096
Numbers = TypeVar("Numbers", Vectors, Tensor)


def nearest(
    query: Vectors, key: Vectors, k: int, device: torch.device | None = None, chunk: int = CHUNK
) -> tuple[Vectors, Indices]:
    """Cosines and places of the k nearest keys of each query, the nearest first: both [n, min(k, m)]. `query` [n, D]
    and `key` [m, D] are L2-normalised. The search is exact. Memory beside the result: chunk x chunk scores."""
    k = min(k, len(key))
    values, places = np.empty((len(query), k), np.float32), np.empty((len(query), k), np.int64)
    for start in range(0, len(query), chunk):
        part = torch.from_numpy(query[start : start + chunk]).to(device)
        best, where = part.new_full((len(part), 0), 0.0), torch.zeros((len(part), 0), dtype=torch.int64, device=device)
        for first in range(0, len(key), chunk):
            scores = part @ torch.from_numpy(key[first : first + chunk]).to(device).T
            found = scores.topk(min(k, scores.shape[1]), dim=1)
            best, where = torch.cat([best, found.values], 1), torch.cat([where, found.indices + first], 1)
            kept = best.topk(min(k, best.shape[1]), dim=1)
            best, where = kept.values, where.gather(1, kept.indices)
        values[start : start + chunk], places[start : start + chunk] = best.cpu().numpy(), where.cpu().numpy()
    return values, places


def rescored(score: Score, cosine: Numbers, query: Numbers, key: Numbers) -> Numbers:
    """The scores of pairs by their cosines. `query` and `key`: the mean cosines of each side to its nearest neighbours
    on the other side, in shapes that broadcast to that of `cosine`."""
    if score == "cosine":
        return cosine
    mean: Any = (query + key) / 2
    return cosine / mean if score == "ratio" else cosine - mean if score == "distance" else 2 * (cosine - mean)
