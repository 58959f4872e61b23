"""Exact match and F1 of answers, as the official scripts of SQuAD v1.1 and MLQA compute them.

XQuAD and TyDiQA-GoldP are scored by the rules of SQuAD in every language. MLQA has articles, punctuation and tokens by
language.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from statistics import fmean

Normal = Callable[[str], list[str]]  # the tokens that are compared
ENGLISH = r"\b(?:a|an|the)\b"
ARTICLES = {
    "en": ENGLISH,
    "es": r"\b(?:un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(?:của|là|cái|chiếc|những)\b",
    "de": r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": "ال",  # also inside of words, as in the script
}
HAN = re.compile("([\u4e00-\u9fa5])")


def squad_tokens(text: str) -> list[str]:
    """SQuAD's rules, which are those of English."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(ENGLISH, " ", kept).split()


def mlqa_tokens(text: str, language: str) -> list[str]:
    """MLQA's rules. In Chinese each Han character is a token; languages that MLQA lacks have no articles."""
    kept = "".join(char for char in text.lower() if not _is_punctuation(char))
    if language in ARTICLES:
        kept = re.sub(ARTICLES[language], " ", kept)
    return (HAN.sub(r" \1 ", kept) if language == "zh" else kept).split()


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def answer_f1(gold: list[str], predicted: list[str]) -> float:
    """F1 of the tokens of two answers. 0 if they share none."""
    same = sum((Counter(gold) & Counter(predicted)).values())
    return 2 * same / (len(gold) + len(predicted)) if same else 0.0


def answer_scores(gold: list[list[str]], predicted: list[list[str]], tokens: Normal) -> dict[str, float]:
    """F1 and exact match, from 0 to 1: of each question the best over its right answers. `predicted`: one answer
    each."""
    pairs = [([tokens(x) for x in right], tokens(found)) for right, (found,) in zip(gold, predicted, strict=True)]
    return {
        "f1": fmean(max(answer_f1(x, found) for x in right) for right, found in pairs),
        "exact": fmean(float(found in right) for right, found in pairs),
    }
