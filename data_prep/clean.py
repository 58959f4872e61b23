"""What is done to every text before it is tokenised, and no more: canonical composition, single spaces, no control
characters."""

from __future__ import annotations

import unicodedata


def clean(text: str) -> str:
    """NFC, runs of white space folded to a space, other control characters dropped."""
    folded = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(c for c in folded if unicodedata.category(c) != "Cc")
