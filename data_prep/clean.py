"""What is done to every text before it is tokenised, and no more: composition, single spaces, no control characters."""

from __future__ import annotations

import unicodedata


def clean(text: str) -> str:
    """Control characters dropped but for white space, and lone surrogates, which JSON can spell and UTF-8 cannot; NFC;
    runs of white space folded to a space."""
    # First what is dropped: its neighbours may then compose, or be one run of white space.
    kept = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join(unicodedata.normalize("NFC", kept).split())
