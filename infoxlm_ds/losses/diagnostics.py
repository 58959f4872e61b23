"""Measures of the geometry of representations (Wang & Isola, 2020; Garrido et al., 2023). Pure functions in float32.

Legend: n vectors, D width. Vectors are divided by their norms first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

SAMPLE = 2048  # vectors that `describe_space` reads


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of the pairs (a [n, D], b [n, D]), []. It is 0 if translations coincide, and 2 if they are
    unrelated."""
    return (normalize(a.float(), dim=1) - normalize(b.float(), dim=1)).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """Log of the mean of exp(-2 distance^2) over pairs of different vectors of x [n, D], n > 1, []. It is 0 if all
    coincide, and about -4 if they fill a sphere of many dimensions."""
    return torch.pdist(normalize(x.float(), dim=1)).square().mul(-2).exp().mean().log()


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of x [n, D], [] (RankMe): the dimensions in use."""
    values = torch.linalg.svdvals(normalize(x.float(), dim=1))
    fraction = values / values.sum()
    return torch.special.entr(fraction).sum().exp()


def describe_space(first: Tensor, second: Tensor, queue: Tensor | None) -> dict[str, Tensor]:
    """The figures above, of n pairs and of a queue of keys (or None). Reads the first SAMPLE vectors of each."""
    first, second = first[:SAMPLE], second[:SAMPLE]
    values = {"alignment": alignment(first, second), "effective_rank": effective_rank(first)}
    if len(first) > 1:
        values["uniformity"] = uniformity(first)
    if queue is not None:
        values["queue_effective_rank"] = effective_rank(queue[:SAMPLE])
    return values
