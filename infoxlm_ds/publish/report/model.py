"""What a run's model does on held-out text: accuracy by layer and language, similarities, and a map of sentences before
and after training.

Legend: n sentences, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds.config import Probe, UserError
from infoxlm_ds.data.flat_batch import FlatBatch
from infoxlm_ds.data.manifest import load_manifest
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.evaluation.embed import embed
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.evaluation.retrieval import pair_accuracy, trigram_accuracy
from infoxlm_ds.evaluation.text import Pairs, pairs_with_pivot
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.heads import pool
from infoxlm_ds.model.pretrained import build_model, strip_vocabulary
from infoxlm_ds.publish.report.read import Run
from infoxlm_ds.publish.trained import read_trained

PAIRS, LANGUAGES, MATRIX, MAPPED = 200, 30, 24, 8  # pairs of a language; languages; pairs in the matrix; mapped ones
MAP_ROWS = 40  # sentences of each language in the map


@dataclass(frozen=True)
class Seen:
    """`accuracy` [L + 2, languages]: accuracy@1 of each layer's pooled states, the embeddings' first, and last of the
    sentence vector. `trigrams` [languages]. `matrix` [n, n]: cosines of sentence vectors of the pivot and of
    `languages[shown]`. `maps`: by name, points [n, 2] and each one's language."""

    data: str
    pairs: int
    pivot: str
    languages: list[str]
    accuracy: np.ndarray
    trigrams: list[float]
    matrix: np.ndarray
    shown: int
    maps: dict[str, tuple[np.ndarray, list[str]]]
    how: str


def look(run: Run, probe: Probe) -> Seen:
    """Measure the newest checkpoint on the text of a probe. `run` must have one. UserError if the text is missing or
    malformed."""
    assert run.recipe is not None
    every = pairs_with_pivot(list(read_nway(probe.data)), probe.pivot, probe.languages, 2, str(probe.data))
    pairs = [of_language.first(PAIRS) for of_language in every[:LANGUAGES]]
    newest = run.checkpoints[-1].folder
    trained = read_trained(run.recipe, run.folder, newest, None)
    vectors_of = partial(_vectors, tokenizer=trained.tokenizer, positions=trained.positions)
    accuracy, matrix = [], np.zeros((0, 0), np.float32)
    shown = next((i for i, one in enumerate(pairs) if one.cross_script), 0)
    for number, of_language in enumerate(pairs):
        name = f"{run.name}: {of_language.language}"
        pivot, other = (
            vectors_of(trained.model, texts, description=name) for texts in (of_language.pivot_text, of_language.text)
        )
        accuracy.append([pair_accuracy(pivot[i], other[i], of_language) for i in range(len(pivot))])
        if number == shown:
            matrix = pivot[-1][:MATRIX] @ other[-1][:MATRIX].T
    start, begun = _before(run)
    project, how = _projector()
    maps = {}
    for name, model in ((begun, start), (f"after step {run.checkpoints[-1].step:,}", trained.model)):
        if model is not None:
            maps[name] = _map(partial(vectors_of, model), pairs[:MAPPED], probe.pivot, project)
    return Seen(
        data=Path(probe.data).name,
        pairs=max(len(one.text) for one in pairs),
        pivot=probe.pivot,
        languages=[one.language for one in pairs],
        accuracy=np.array(accuracy).T,
        trigrams=[float(np.mean(trigram_accuracy(one.pivot_text, one.text))) for one in pairs],
        matrix=matrix,
        shown=shown,
        maps=maps,
        how=how,
    )


def _vectors(model: InfoXLM, texts: list[str], tokenizer: Any, positions: int, description: str = "") -> Vectors:
    """[L + 2, n, D], L2-normalised: the embeddings, each layer, and the sentence vector."""
    body, head, middle = model.body, model.head, model.universal_layer

    @torch.no_grad()
    def encode(batch: FlatBatch) -> Tensor:
        found = [pool(hidden, batch.layout, head.pooling) for hidden in body.states(batch)]
        return torch.stack([*found, head.finish(found[middle])], dim=1)

    device = torch.device("cpu")
    vectors = embed(texts, tokenizer, positions, encode, device, description=description, quiet=True)
    return np.ascontiguousarray(vectors.swapaxes(0, 1))


def _before(run: Run) -> tuple[InfoXLM | None, str]:
    """The model that the run began with, and a name for it; None if what it began with is gone."""
    assert run.recipe is not None
    recipe = run.recipe
    try:
        tokenizer = load_manifest(recipe.corpus).tokenizer
        model = build_model(recipe.model, tokenizer.vocab_size, recipe.seed, tokenizer.special_ids)
    except (UserError, OSError):
        return None, ""
    strip_vocabulary(model.lm)
    return model.eval(), f"before, {recipe.model.init or 'random weights'}"


def _projector() -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """What lays vectors [n, D] on a plane [n, 2], and its name."""
    if find_spec("umap") is not None:
        import umap  # type: ignore[import-not-found]

        return lambda vectors: np.asarray(umap.UMAP(random_state=1).fit_transform(vectors)), "UMAP"
    from sklearn.decomposition import PCA

    return lambda vectors: np.asarray(PCA(2, random_state=1).fit_transform(vectors)), "PCA"


def _map(
    vectors_of: Callable[[list[str]], Vectors],
    pairs: Sequence[Pairs],
    pivot: str,
    project: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, list[str]]:
    """The same first sentences of each language. Their pivots are those of the first language."""
    texts = {pivot: pairs[0].pivot_text[:MAP_ROWS]} | {one.language: one.text[:MAP_ROWS] for one in pairs}
    names = [language for language, of_language in texts.items() for _ in of_language]
    vectors = vectors_of([text for of_language in texts.values() for text in of_language])
    return project(vectors[-1]), names
