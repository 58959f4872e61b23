"""What the filters dropped: a count and ten samples of each reason."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

SAMPLES = 10  # of each reason
QUOTED = 300  # characters of a text in a sample


class Sample(NamedTuple):
    """A dropped text with the text it was compared with, by language. Samples are chosen by their hash."""

    hash: str
    place: str
    texts: dict[str, str]


class Report:
    """Counts and samples by reason. They do not depend on the order in which texts are dropped and reports merged."""

    def __init__(self, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.samples: dict[str, list[Sample]] = {}
        self._seed = seed

    def drop(self, reason: str, place: str, texts: Mapping[str, str]) -> None:
        """Count a dropped text and keep it as a sample if its hash is among the smallest."""
        self.counts[reason] += 1
        content = "\0".join((str(self._seed), reason, *texts, *texts.values()))
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        samples = self.samples.get(reason, [])
        if len(samples) < SAMPLES or digest <= samples[-1].hash:
            quoted = {language: text[:QUOTED] for language, text in texts.items()}
            self._keep(reason, [Sample(digest, place, quoted)])

    def merge(self, other: Report) -> None:
        """Add what another report counted and kept."""
        self.counts.update(other.counts)
        for reason, samples in other.samples.items():
            self._keep(reason, samples)

    def tree(self) -> dict[str, Any]:
        """Counts and samples as JSON has them."""
        samples = {reason: [sample._asdict() for sample in self.samples[reason]] for reason in sorted(self.samples)}
        return {"counts": dict(sorted(self.counts.items())), "samples": samples}

    @classmethod
    def of_tree(cls, seed: int, tree: dict[str, Any]) -> Report:
        """The report that wrote the tree, with the same seed."""
        report = cls(seed)
        report.counts.update(tree["counts"])
        report.samples = {reason: [Sample(**sample) for sample in group] for reason, group in tree["samples"].items()}
        return report

    def _keep(self, reason: str, new: list[Sample]) -> None:
        different: dict[str, Sample] = {}  # a text that is dropped often is one sample: the one at the smallest place
        for sample in (*self.samples.get(reason, []), *new):
            known = different.get(sample.hash, sample)
            different[sample.hash] = min(known, sample, key=lambda x: x.place)
        self.samples[reason] = heapq.nsmallest(SAMPLES, different.values(), key=lambda x: x.hash)
