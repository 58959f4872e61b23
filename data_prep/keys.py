"""Writes the table of all keys of CORPUS.yaml into docs/data.md. `python -m data_prep.keys`"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from data_prep.description import CorpusDescription
from infoxlm_ds.config import Section

DOCUMENT = Path(__file__).parent.parent / "docs" / "data.md"
BEGIN, END = "<!-- keys: written by `python -m data_prep.keys` -->\n", "<!-- end of keys -->"


def main() -> None:
    DOCUMENT.write_text(with_keys(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def with_keys(text: str) -> str:
    """The text with the table between its marks renewed."""
    table = "| key | value | default | |\n|---|---|---|---|\n" + "".join(rows(CorpusDescription))
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}{table}{END}", text, flags=re.DOTALL)


def rows(section: type[Section], prefix: str = "") -> Iterator[str]:
    """A line of Markdown for each key of a section, sections below it included."""
    for name, field in section.model_fields.items():
        many = get_origin(field.annotation) is tuple
        below = next(_sections(field.annotation), None)
        value = "sections, see below" if below and many else "section" if below else _value(field)
        yield f"| `{prefix}{name}` | {value} | {_default(field, below)} | {field.description} |\n"
        if below:
            yield from rows(below, f"{prefix}{name}{'[]' * many}.")


def _sections(annotation: Any) -> Iterator[type[Section]]:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            yield kind


def _value(field: FieldInfo) -> str:
    bounds = ", ".join(
        f"{sign} {getattr(bound, name):,}"
        for bound in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(bound, name)
    )
    return _kind(field.annotation) + (f" ({bounds})" if bounds else "")


_SIGNS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
_KINDS = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        return _kind(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"{_kind(arguments[0])}: {_kind(arguments[1])}"
    return _kind(arguments[0]) if arguments else _KINDS[annotation]


def _default(field: FieldInfo, below: type[Section] | None) -> str:
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True)
    if below and value is not None:
        return "the defaults below"
    return "" if value in (None, (), {}) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()
