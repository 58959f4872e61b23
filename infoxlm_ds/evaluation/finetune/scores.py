"""Scores of predicted labels, from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

Labels = Sequence[Sequence[str]]  # of examples; each has one label, or one a word
Entity = tuple[str, int, int]  # type, first word, the word after the last


def accuracy(gold: Labels, predicted: Labels) -> float:
    """The share of labels that are right."""
    pairs = [pair for g, p in zip(gold, predicted, strict=True) for pair in zip(g, p, strict=True)]
    return sum(g == p for g, p in pairs) / len(pairs) if pairs else 0.0


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sentence's IOB2 tags. An entity begins with B-, or with an I- that does not go on with the
    type before it: the lenient reading, which seqeval has by default."""
    found: set[Entity] = set()
    kind, first = "", 0
    for i, tag in enumerate([*tags, "O"]):
        here = "" if tag == "O" else tag[2:]
        if here == kind and not tag.startswith("B-"):
            continue
        if kind:
            found.add((kind, first, i))
        kind, first = here, i
    return found


def entity_f1(gold: Labels, predicted: Labels) -> float:
    """F1 of whole entities over all sentences: type and both ends must be right. 0 if there are none."""
    right = guessed = real = 0
    for g, p in zip(gold, predicted, strict=True):
        in_gold, in_predicted = entities(g), entities(p)
        right += len(in_gold & in_predicted)
        guessed, real = guessed + len(in_predicted), real + len(in_gold)
    return 2 * right / (guessed + real) if right else 0.0


SCORES = {"accuracy": accuracy, "f1": entity_f1}
