"""Writes the tables of all keys of CORPUS.yaml and of recipes into docs. `python -m data_prep.keys`

A key is explained by its `description` or, where it has none, by comments: those above its line in the source and the
one at its end.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import tokenize
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from data_prep.description import CorpusDescription
from infoxlm_ds.config import Recipe, Section

DOCS = Path(__file__).parent.parent / "docs"
ABOUT_CORPORA, ABOUT_RECIPES = DOCS / "data.md", DOCS / "recipe.md"
BEGIN, END = "<!-- keys: written by `python -m data_prep.keys` -->\n", "<!-- end of keys -->"
SIGNS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
KINDS = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


def main() -> None:
    """Write both documents."""
    for document in (ABOUT_CORPORA, ABOUT_RECIPES):
        document.write_text(with_keys(document), encoding="utf-8")


def with_keys(document: Path) -> str:
    """The text of a document with the tables between its marks renewed."""
    tables = table(rows(CorpusDescription)) if document == ABOUT_CORPORA else "\n".join(chapters(Recipe))
    text = document.read_text(encoding="utf-8")
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}{tables}{END}", text, flags=re.DOTALL)


def chapters(whole: type[Section]) -> Iterator[str]:
    """A table of the keys that are no sections, then a heading, the docstring and a table for each section."""
    sections = {name: below[0] for name, field in whole.model_fields.items() if (below := _sections(field))}
    yield table(row for row in rows(whole, deep=False) if row.split("`")[1] not in sections)
    for name, section in sections.items():
        about = f"{_linked(inspect.cleandoc(section.__doc__))}\n\n" if section.__doc__ else ""
        must = "" if whole.model_fields[name].is_required() else "This section may be left out.\n\n"
        yield f"### {name}\n{about}{must}{table(rows(section, f'{name}.'))}"


def table(lines: Iterable[str]) -> str:
    """A table of Markdown with these lines."""
    return "| key | value | default | |\n|---|---|---|---|\n" + "".join(lines)


def rows(section: type[Section], prefix: str = "", deep: bool = True) -> Iterator[str]:
    """A line of Markdown for each key of a section and, with `deep`, of the sections below it."""
    comments = _comments(section)
    for name, field in section.model_fields.items():
        below, many = _sections(field), get_origin(field.annotation) is tuple
        value = "sections, see below" if below and many else "section" if below else _value(field)
        if len(below) > 1:
            value = "number, or a section, see below"
        about = field.description or comments.get(name) or _first_line(below)
        assert about, f"{section.__name__}.{name} has no description and no comment"
        yield f"| `{prefix}{name}` | {value} | {_default(field, below)} | {_linked(about)} |\n"
        start = f"{prefix}{name}{'[]' * many}."
        if deep and len(below) == 1:
            yield from rows(below[0], start)
        elif deep and below:
            yield from _alternatives(below, start)


def _alternatives(forms: list[type[Section]], start: str) -> Iterator[str]:
    """The keys of sections of which one is chosen by its `schedule`, each key once for each form that has it."""
    names = ", ".join(_kind(form.model_fields["schedule"].annotation) for form in forms)
    yield f"| `{start}schedule` | {names} | must be set | which of these sections it is |\n"
    for form in forms:
        chosen = get_args(form.model_fields["schedule"].annotation)[0]
        for row in rows(form, start):
            if not row.startswith(f"| `{start}schedule`"):
                yield row.replace("` |", f"` ({chosen}) |", 1)


def _comments(section: type[Section]) -> dict[str, str]:
    """What the comments in the source say of each key."""
    source = inspect.getsource(section)
    found, lines = {}, source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.removeprefix("#").strip()
    comments = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            numbers = [*range(first, node.lineno), node.end_lineno or node.lineno]
            comments[node.target.id] = " ".join(found[number] for number in numbers if number in found)
    return comments


def _linked(text: str) -> str:
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text)


def _first_line(sections: list[type[Section]]) -> str:
    return (sections[0].__doc__ or "").splitlines()[0] if len(sections) == 1 else ""


def _sections(field: FieldInfo) -> list[type[Section]]:
    """The sections that a key's value may be."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def _value(field: FieldInfo) -> str:
    return _kind(field.annotation) + _bounds(field.metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    found = ", ".join(
        f"{sign} {getattr(bound, name):,}" for bound in metadata for name, sign in SIGNS.items() if hasattr(bound, name)
    )
    return f" ({found})" if found else ""


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        return _kind(next(argument for argument in arguments if argument is not type(None)))
    if origin is Annotated:
        metadata = [one for x in arguments[1:] for one in (x.metadata if isinstance(x, FieldInfo) else [x])]
        return _kind(arguments[0]) + _bounds(metadata)
    if origin is tuple:
        fixed = [_kind(argument) for argument in arguments if argument is not ...]
        return f"list of {fixed[0]}" if ... in arguments else f"[{', '.join(fixed)}]"
    if origin is dict:
        return f"{_kind(arguments[0])}: {_kind(arguments[1])}"
    return KINDS[annotation]


def _default(field: FieldInfo, below: list[type[Section]]) -> str:
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True)
    if len(below) == 1 and value not in (None, ()):
        return "the defaults below"
    if isinstance(value, Section):
        return f"`{json.dumps(value.model_dump())}`"
    return "" if value in (None, (), {}) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()
