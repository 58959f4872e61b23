"""Any model that sentence-transformers loads, as an embedder, to be measured beside ours."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.model.loading import loading
from infoxlm_ds.model.sentence_vector import View

OWN = -1  # the number of the layer that such a model pools: it does not say


class OtherModel:
    """A folder or a name on a hub. A plain Hugging Face encoder gets mean pooling of its last layer, as
    sentence-transformers does it. UserError if that package is missing, or if it cannot load the model."""

    projected = False
    views = (View(OWN, "mean"),)

    def __init__(self, name: str) -> None:
        if find_spec("sentence_transformers") is None:
            raise UserError("--beside needs sentence-transformers: pip install 'infoxlm-ds[sentence-transformers]'")
        from sentence_transformers import SentenceTransformer

        with loading(f"--beside {name} cannot be loaded"):
            self._model = SentenceTransformer(name)

    def embed(self, sentences: list[str], *, description: str = "") -> Vectors:
        """L2-normalised vectors [1, n, D], by the model's own pooling and its default prompt."""
        found = self._model.encode(sentences, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)[None]
