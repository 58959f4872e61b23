"""Retrieval on held-out text during training: accuracy@1 of the current encoder, beside the trigram baseline."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from infoxlm_ds import dist
from infoxlm_ds.config import Probe
from infoxlm_ds.data.text import read_nway
from infoxlm_ds.evaluation.embed import embed
from infoxlm_ds.evaluation.retrieval import retrieval_accuracy, trigram_accuracy
from infoxlm_ds.evaluation.text import Pairs, pairs_with_pivot
from infoxlm_ds.model.attention import why_not_varlen
from infoxlm_ds.model.encoder import SentenceEncoder
from infoxlm_ds.monitor.meters import Scalars


class RetrievalProbe:
    """Retrieval on held-out pairs. The result is the same on all ranks."""

    def __init__(self, probe: Probe, tokenizer: Path, positions: int) -> None:
        """`positions`: tokens of the longest sequence that the model takes; longer sentences are cut. Reads the data:
        UserError if it is missing or malformed."""
        self._pairs = read_probe(probe)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        self._positions = positions
        self._baseline = {p.language: float(np.mean(trigram_accuracy(p.pivot_text, p.text))) for p in self._pairs}

    @torch.no_grad()
    def run(self, encoder: SentenceEncoder) -> Scalars:
        """Accuracy@1, mean of both directions: `probe/<language>`, `probe/mean` and `probe/trigram_mean`.
        Collective."""
        dtype = next(encoder.parameters()).dtype
        dense = why_not_varlen(dist.device(), dtype, encoder.body.head_width) is not None
        vectors_of = partial(
            embed,
            tokenizer=self._tokenizer,
            positions=self._positions,
            encode=encoder,
            device=dist.device(),
            dense=dense,
            shared=True,
        )
        results = {}
        for pairs in self._pairs:
            pivot, other = vectors_of(pairs.pivot_text), vectors_of(pairs.text)
            forward = retrieval_accuracy(pivot, other, pairs.text)
            backward = retrieval_accuracy(other, pivot, pairs.pivot_text)
            results[pairs.language] = ((forward + backward) / 2, self._baseline[pairs.language])
        scores = {f"probe/{language}": accuracy for language, (accuracy, _) in sorted(results.items())}
        means = np.mean(list(results.values()), axis=0)
        return scores | {"probe/mean": float(means[0]), "probe/trigram_mean": float(means[1])}


def read_probe(probe: Probe) -> list[Pairs]:
    """The pairs of each language. UserError if the data is missing or malformed."""
    pairs = pairs_with_pivot(list(read_nway(probe.data)), probe.pivot, probe.languages, 2, str(probe.data))
    return [of_language.first(probe.pairs) for of_language in pairs]
