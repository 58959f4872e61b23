"""A held-out retrieval probe in mid-training: accuracy@1 of the encoder as it is, beside the trigram baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from infoxlm_ds import dist
from infoxlm_ds.config import Probe
from infoxlm_ds.evaluation.parallel_text import Pairs, pairs_with_pivot, read_rows
from infoxlm_ds.evaluation.retrieval import retrieval_accuracy, trigram_accuracy
from infoxlm_ds.model.encoder import SentenceEncoder, packed
from infoxlm_ds.monitor.meters import Scalars

BATCH = 256


class RetrievalProbe:
    """The ranks take batches in turn; the result is the same on all."""

    def __init__(self, probe: Probe, tokenizer: Path, longest: int) -> None:
        """`longest`: tokens a sentence is cut to. Reads the data: UserError where it is missing or malformed."""
        all_pairs = pairs_with_pivot(read_rows(probe.data), probe.pivot, probe.languages, 2, str(probe.data))
        self._pairs = [_first(p, probe.pairs) for p in all_pairs]
        self._tokenizer, self._longest = AutoTokenizer.from_pretrained(tokenizer), longest
        self._baseline = {p.language: float(np.mean(trigram_accuracy(p.pivot_text, p.text))) for p in self._pairs}

    @torch.no_grad()
    def run(self, encoder: SentenceEncoder) -> Scalars:
        """Accuracy@1, mean of both directions: `probe/<language>`, `probe/mean` and `probe/trigram_mean`.
        Collective."""
        results = {}
        for pairs in self._pairs:
            pivot, other = (self._embed(encoder, texts) for texts in (pairs.pivot_text, pairs.text))
            forward, backward = (
                retrieval_accuracy(pivot, other, pairs.text),
                retrieval_accuracy(other, pivot, pairs.pivot_text),
            )
            results[pairs.language] = ((forward + backward) / 2, self._baseline[pairs.language])
        scores = {f"probe/{language}": accuracy for language, (accuracy, _) in sorted(results.items())}
        means = np.mean(list(results.values()), axis=0)
        return scores | {"probe/mean": float(means[0]), "probe/trigram_mean": float(means[1])}

    def _embed(self, encoder: SentenceEncoder, texts: list[str]) -> np.ndarray:
        ids = self._tokenizer(texts, truncation=True, max_length=self._longest)["input_ids"]
        batches = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
        world, parts = dist.world_size(), []
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            # Every rank calls the encoder in every turn, which ZeRO 3 asks for; one too many repeats the first batch.
            batch = turn[dist.rank() if dist.rank() < len(turn) else 0]
            tokens = packed(np.concatenate(batch), np.array([len(one) for one in batch])).to(dist.device())
            vectors = torch.nn.functional.normalize(encoder(tokens).float(), dim=1)
            counts = [len(one) for one in turn] + [0] * (world - len(turn))
            parts.append(dist.gather_rows(vectors[: counts[dist.rank()]], counts).cpu())
        return torch.cat(parts).numpy()


def _first(pairs: Pairs, count: int) -> Pairs:
    return Pairs(pairs.language, pairs.pivot_text[:count], pairs.text[:count], pairs.cross_script)
