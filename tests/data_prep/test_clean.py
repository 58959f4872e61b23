"""`clean` is fast and does what its definition, character by character, does."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import Form, clean

UNICODE = [chr(code) for code in range(sys.maxunicode + 1)]
FORMS: list[Form] = ["nfc", "nfkc"]


def defined(text: str, form: Form) -> str:
    kept = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join(unicodedata.normalize("NFC" if form == "nfc" else "NFKC", kept).split())


@pytest.mark.parametrize("form", FORMS)
def test_every_code_point_alone(form: Form) -> None:
    assert not [c for c in UNICODE if clean(c, form) != defined(c, form)]


@pytest.mark.parametrize("form", FORMS)
def test_every_code_point_in_context(form: Form) -> None:
    """Each assigned one between letters, between spaces, beside combining marks, between parts of a Korean syllable."""
    assigned = [c for c in UNICODE if unicodedata.category(c) not in ("Cn", "Co")]
    for start in range(0, len(assigned), 64):  # few calls: it saves time
        text = " x ".join(f"a{c}b {c} e\u0301{c}\u0301{c} \u1100{c}\u1161" for c in assigned[start : start + 64])
        assert clean(text, form) == defined(text, form)


@given(st.text(st.characters(categories=None)) | st.text(" a\u0301\x85\x1c\x00\ud800\ufb01\u1100\u1161"))
def test_any_text(text: str) -> None:
    for form in FORMS:
        assert clean(text, form) == defined(text, form)
        assert clean(clean(text, form), form) == clean(text, form)
