"""How sentence vectors lie, layer by layer: what the contrast changes inside an encoder.

Legend: n texts, D width, V views, L languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from infoxlm_ds.config import Pooling
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.evaluation.retrieval import Embedder, embed_pivots, pair_accuracy
from infoxlm_ds.evaluation.text import Pairs

RANDOM_PAIRS = 10_000
PROBED = 400  # texts of a language, at most, that the language probe reads


@dataclass(frozen=True)
class LayerRow:
    """One view of a model.

    `retrieval`: accuracy@1, mean of both directions and all languages. `language`: accuracy of a linear probe of a
    sentence's language, on rows that it was not trained on; `chance`: of its guess without a vector. `distance`:
    between the centroids of a language and the pivot on the same rows, over the spread of the pivot's texts around
    theirs; mean of the languages. `anisotropy`: mean cosine of texts of different rows, whatever their languages
    (Ethayarajh, 2019): 0 if vectors point in all directions, 1 if all point in one."""

    layer: int
    pooling: Pooling
    retrieval: float
    language: float
    chance: float
    distance: float
    anisotropy: float


def evaluate_layers(embedder: Embedder, pairs: Sequence[Pairs]) -> list[LayerRow]:
    """A row for each view, by rising layer. `pairs`: of one file, with one pivot."""
    pivots = list(embed_pivots(embedder, pairs))
    others = [embedder.embed(of_language.text, description=of_language.language) for of_language in pairs]
    most = max(range(len(pairs)), key=lambda i: len(pairs[i].rows))  # the pivot's texts in these pairs stand for it
    numbers = [pairs[most].rows, *(one.rows for one in pairs)]
    rows = []
    for number, view in enumerate(embedder.views):
        both = [(pivot[number], other[number]) for pivot, other in zip(pivots, others, strict=True)]
        every = [both[most][0], *(other for _, other in both)]
        accuracy, chance = language_probe(every, numbers)
        rows.append(
            LayerRow(
                layer=view.layer,
                pooling=view.pooling,
                retrieval=float(np.mean([pair_accuracy(*of, one) for of, one in zip(both, pairs, strict=True)])),
                language=accuracy,
                chance=chance,
                distance=float(np.mean([centroid_distance(*of) for of in both])),
                anisotropy=anisotropy(np.concatenate(every), numbers),
            )
        )
    return rows


def language_probe(vectors: Sequence[Vectors], rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Accuracy of a logistic regression of the language, and of always guessing the largest one. It learns from texts
    of rows with even numbers and is measured on the others, so no meaning is on both sides. `vectors`: of each language
    [n, D]; `rows`: the numbers of their rows."""
    from sklearn.linear_model import LogisticRegression  # over a second

    kept = [of_language[:PROBED] for of_language in vectors]
    labels = np.concatenate([np.full(len(of), number) for number, of in enumerate(kept)])
    even = np.concatenate([np.array(numbers[:PROBED]) % 2 == 0 for numbers in rows])
    x = np.concatenate(kept)
    if len(set(labels[even])) < 2 or even.all():
        return float("nan"), float("nan")
    probe = LogisticRegression(max_iter=1000, C=100.0).fit(x[even], labels[even])
    return float(probe.score(x[~even], labels[~even])), float(np.bincount(labels[~even]).max() / (~even).sum())


def centroid_distance(pivot: Vectors, other: Vectors) -> float:
    """Of two languages on the same rows, both [n, D]: the distance of their means over the root mean square distance of
    the pivot's texts to their own mean."""
    middle = pivot.mean(0)
    spread = float(np.sqrt(((pivot - middle) ** 2).sum(1).mean()))
    return float(np.linalg.norm(other.mean(0) - middle)) / max(spread, 1e-12)


def anisotropy(vectors: Vectors, rows: Sequence[Sequence[int]]) -> float:
    """The mean cosine of random pairs of L2-normalised vectors [n, D] of different rows."""
    numbers = np.concatenate([np.array(of_language) for of_language in rows])
    chance = np.random.default_rng(0)
    one, other = (chance.integers(0, len(vectors), RANDOM_PAIRS) for _ in range(2))
    different: npt.NDArray[np.bool_] = numbers[one] != numbers[other]
    return float((vectors[one[different]] * vectors[other[different]]).sum(1).mean())


def print_layers(data: str, rows: Sequence[LayerRow], languages: int, console: Console) -> None:
    """A table with a line for each view."""
    table = Table(
        title=f"{Path(data).name}, {languages} languages", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    table.add_column("layer", no_wrap=True)
    for heading in ("retrieval", "language", "chance", "distance", "anisotropy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (row.retrieval, row.language, row.chance, row.distance, row.anisotropy)
        table.add_row(f"{row.layer} {row.pooling}", *(f"{value:.3f}" for value in figures))
    table.caption = (
        "retrieval: accuracy@1; language: accuracy of a linear probe of the language, beside a guess; "
        "distance: of a language's centroid from the pivot's; anisotropy: mean cosine of different sentences"
    )
    console.print(table)
