"""Cleans a text before it is tokenised: Unicode composition, single spaces, no control characters; nothing else."""

from __future__ import annotations

import unicodedata


def clean(text: str) -> str:
    """Drop control characters, except white space, and lone surrogates, which JSON allows and UTF-8 does not. Apply
    NFC. Replace each run of white space by one space."""
    # Drop characters first: their neighbours may then compose, or form one run of white space.
    kept = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join(unicodedata.normalize("NFC", kept).split())
