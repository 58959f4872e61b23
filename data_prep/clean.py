"""Cleans a text before it is filtered and tokenised: Unicode composition, single spaces, no control characters;
nothing else."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Form = Literal["nfc", "nfkc"]
# Category Cc without what `isspace` calls white space, and Cs.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]+")


def clean(text: str, form: Form = "nfc") -> str:
    """Drop control characters, except white space, and lone surrogates, which JSON allows and UTF-8 does not.
    Normalise. Replace each run of white space by one space."""
    if not text.isascii() or not text.isprintable():
        # Drop characters first: their neighbours may then compose, or form one run of white space.
        text = _DROPPED.sub("", text)
        unicode_form: Literal["NFC", "NFKC"] = "NFC" if form == "nfc" else "NFKC"
        if not unicodedata.is_normalized(unicode_form, text):
            text = unicodedata.normalize(unicode_form, text)
    return " ".join(text.split())
