"""Retrieval on held-out text during training: accuracy@1 of the current encoder, beside the trigram baseline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from infoxlm_ds import dist
from infoxlm_ds.config import Probe
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.evaluation.embed import embed
from infoxlm_ds.evaluation.retrieval import pair_accuracy, trigram_accuracy
from infoxlm_ds.evaluation.text import Pairs, pairs_with_pivot
from infoxlm_ds.model.attention import why_not_varlen
from infoxlm_ds.model.encoder import SentenceEncoder
from infoxlm_ds.monitor.meters import Scalars
from infoxlm_ds.monitor.pictures import Picture, heat_map

SAMPLE = 24  # pairs in the picture of similarities


class Probed(NamedTuple):
    """Scalars by name and, on rank 0, pictures by tag."""

    scores: Scalars
    pictures: dict[str, Picture]


class RetrievalProbe:
    """Retrieval on held-out pairs. The result is the same on all ranks."""

    def __init__(self, probe: Probe, tokenizer: Path, positions: int) -> None:
        """`positions`: tokens of the longest sequence that the model takes; longer sentences are cut. Reads the data:
        UserError if it is missing or malformed."""
        self._pairs = read_probe(probe)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        self._positions = positions
        self._trigrams = float(np.mean([trigram_accuracy(p.pivot_text, p.text) for p in self._pairs]))
        self._pivot = probe.pivot
        self._shown = next((pairs for pairs in self._pairs if pairs.cross_script), self._pairs[0])

    @torch.no_grad()
    def run(self, encoder: SentenceEncoder, pictured: bool = False) -> Probed:
        """Accuracy@1, mean of both directions: `probe/<language>`, `probe/mean` and `probe/trigram_mean`. `pictured`:
        rank 0 draws the pictures too. Collective."""
        dtype = next(encoder.parameters()).dtype
        dense = why_not_varlen(dist.device(), dtype, encoder.body.head_width) is not None
        vectors_of = partial(
            embed,
            tokenizer=self._tokenizer,
            positions=self._positions,
            encode=encoder.by_layer if pictured else lambda batch: encoder(batch)[:, None],
            device=dist.device(),
            dense=dense,
            shared=True,
        )
        by_language, similarity = [], np.zeros((0, 0), np.float32)
        for pairs in self._pairs:
            pivot, other = (vectors_of(texts).swapaxes(0, 1) for texts in (pairs.pivot_text, pairs.text))
            layers = range(len(pivot)) if dist.rank() == 0 else [-1]
            by_language.append([pair_accuracy(pivot[layer], other[layer], pairs) for layer in layers])
            if pairs is self._shown:
                similarity = pivot[-1][:SAMPLE] @ other[-1][:SAMPLE].T
        table = np.array(by_language).T  # [K + 2 or 1, languages]
        scores = dict(zip((f"probe/{pairs.language}" for pairs in self._pairs), table[-1].tolist(), strict=True))
        means = {"probe/mean": float(table[-1].mean()), "probe/trigram_mean": self._trigrams}
        drawn = pictured and dist.rank() == 0
        return Probed(scores | means, self._pictures(table, similarity) if drawn else {})

    def _pictures(self, table: np.ndarray, similarity: np.ndarray) -> dict[str, Picture]:
        languages = [pairs.language for pairs in self._pairs]
        layers = ["embeddings", *(f"layer {number}" for number in range(1, len(table) - 1)), "sentence vector"]
        sample = [str(number) for number in range(1, len(similarity) + 1)]
        pivot, other = self._pivot, self._shown.language
        title = f"cosine of sentence vectors: {pivot} (rows), {other} (columns)"
        return {
            "retrieval/layers": heat_map("accuracy@1, %, by layer and language", table[::-1], layers[::-1], languages),
            "retrieval/similarity": heat_map(title, similarity, sample, sample, figures=False),
        }


def read_probe(probe: Probe) -> list[Pairs]:
    """The pairs of each language. UserError if the data is missing or malformed."""
    pairs = pairs_with_pivot(list(read_nway(probe.data)), probe.pivot, probe.languages, 2, str(probe.data))
    return [of_language.first(probe.pairs) for of_language in pairs]
