"""Words of a text, and the filter of texts that repeat themselves."""

from __future__ import annotations

from collections import Counter

LONGEST_WORD = 20  # on average; with longer ones, the text is of a script without spaces
SHORTEST = 30  # characters: some languages write large numbers with one word again and again


def words(text: str) -> list[str]:
    """The words of a text; its characters if its script puts no spaces between words."""
    found = text.split()
    return found if len(text) <= LONGEST_WORD * len(found) else list(text)


def repeats_itself(text: str, share: float, times: int) -> bool:
    """Whether one sequence of one to four words stands at least `times` times and is more than this share of the
    text. False for short texts."""
    if len(text) < SHORTEST:
        return False
    found = words(text)
    # With so few repeated words, or so many different ones, no sequence is that frequent.
    different = len(set(found))
    if len(found) - different < times - 1 or different > len(found) * (1 - share) + 4:
        return False
    for n in range(1, 5):
        grams = Counter(zip(*(found[start:] for start in range(n)), strict=False))
        count = grams.most_common(1)[0][1] if grams else 0
        if count >= times and count * n > share * len(found):
            return True
    return False
