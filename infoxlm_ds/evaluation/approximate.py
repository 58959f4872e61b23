"""Approximate nearest neighbours with faiss: keys lie in cells, and a query looks into the cells that are near it.

Legend: n queries, m keys, D width, k neighbours.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.neighbours import Indices, Rows, Vectors, nearest
from infoxlm_ds.evaluation.progress import blocks

CHUNK = 8192  # vectors that are copied at once
PROBES = 64  # cells that a query looks into
PER_CELL = 64  # keys of a cell that its centre is learned from
SAMPLE = 1000  # queries that recall is measured on


def check_faiss() -> None:
    """UserError if faiss is not installed."""
    if find_spec("faiss") is None:
        raise UserError("--search ivf needs faiss: pip install 'infoxlm-ds[mining]'")


def nearest_by_cells(query: Rows, key: Rows, k: int, probes: int = PROBES, what: str = "") -> tuple[Vectors, Indices]:
    """As `neighbours.nearest`, on the CPU. Some of the neighbours may be missed; a place without a key has the cosine
    -inf. Memory beside the result: the keys in fp16, and 256 sqrt(m) of them in fp32 while cells are learned."""
    import faiss

    k, cells = min(k, len(key)), max(1, min(int(4 * len(key) ** 0.5), len(key) // PER_CELL))
    index: Any = faiss.index_factory(key.shape[1], f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(probes, cells)
    index.by_residual = False  # the keys of a work folder are fp16 already, and stay as they are
    chosen = np.linspace(0, len(key) - 1, min(len(key), cells * PER_CELL)).astype(np.int64)
    index.train(np.array(key[chosen], np.float32))
    for part in blocks(len(key), CHUNK):
        index.add(np.array(key[part], np.float32))
    values, places = np.empty((len(query), k), np.float32), np.empty((len(query), k), np.int64)
    for part in blocks(len(query), CHUNK, what):
        values[part], places[part] = index.search(np.array(query[part], np.float32), k)
    values[places < 0] = -np.inf
    return values, np.maximum(places, 0)


def recall(query: Rows, key: Rows, found: Indices, device: torch.device | None = None) -> float:
    """The fraction of the exact nearest keys that are among `found` [n, k], on a sample of the queries."""
    sample = np.linspace(0, len(query) - 1, min(len(query), SAMPLE)).astype(np.int64)
    _, exact = nearest(query[sample], key, found.shape[1], device)
    hits = (exact[:, :, None] == found[sample][:, None, :]).any(axis=2)
    return float(hits.mean())
