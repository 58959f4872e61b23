"""What programs write into texts: placeholders and markup. Both can be stripped from a text."""

from __future__ import annotations

import re

# {}, {name}, ${name}, {{ name }}, {count, plural, one {# item} other {# items}}; %s, %(name)d, %1$s.
_PLACEHOLDER = re.compile(
    r"[%$#]?\{{1,2}\s*[\w.$-]*\s*(?:[,:!|](?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*+\})*+)?\}{1,2}"
    r"|%(?:\(\w+\)|\d+\$)?[-+#0]?\d*(?:\.\d+)?[sdiufgxX@](?![^\W\d_])"
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|</?\d+>")
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)")


def has_placeholders(text: str) -> bool:
    """Whether a program would replace a part of the text."""
    return ("{" in text or "%" in text) and bool(_PLACEHOLDER.search(text))


def strip_placeholders(text: str) -> str:
    """The text without placeholders."""
    return " ".join(_PLACEHOLDER.sub("", text).split())


def has_markup(text: str) -> bool:
    """HTML tags, or links and images of Markdown."""
    return bool(_TAG.search(text) or _LINK.search(text))


def strip_markup(text: str) -> str:
    """The text without tags; of a link only its text stays."""
    return " ".join(_LINK.sub(r"\1", _TAG.sub(" ", text)).split())
