"""Lines of JSON. Parallel: `{"text": {language: sentence}, "negatives": {language: [sentence, ...]}}`; `negatives` may
be left out. Monolingual, one document a line: `{"text": text or [sentence, ...], "language": language}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.description import SourceDescription
from data_prep.rows import Block, Document, Fault, Item, Row
from data_prep.sources import lines


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    return lines.blocks(source, base, size)


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    (part,) = block.parts
    default = source.languages[0] if source.languages else None
    for number, line in enumerate(lines.lines(part), part.line + 1):
        if isinstance(line, Fault):
            yield line
            continue
        place = f"{part.file} line {number}"
        try:
            tree = json.loads(line)
            if not isinstance(tree, dict):
                raise ValueError("not an object")
            found = _document(place, tree, default) if source.kind == "mono" else _row(place, tree)
        except json.JSONDecodeError as error:
            yield Fault(place, f"not valid JSON: {error.msg} at character {error.pos + 1}")
        except RecursionError:
            yield Fault(place, "not valid JSON: nested too deeply")
        except ValueError as error:
            yield Fault(place, str(error))
        else:
            if found is not None:
                yield found


def _row(place: str, tree: dict[str, Any]) -> Row:
    texts = _mapping(tree.get("text"), '"text"')
    for language, sentence in texts.items():
        _check(sentence, f"the sentence of {language!r}")
    kept = {language: sentence for language, sentence in texts.items() if sentence.strip()}
    if "negatives" not in tree:
        return Row(place, kept)
    negatives = _mapping(tree["negatives"], '"negatives"')
    for language, wrong in negatives.items():
        if not isinstance(wrong, list):
            raise ValueError(f"the negatives of {language!r} are not a list")
        for sentence in wrong:
            _check(sentence, f"a negative of {language!r}")
    return Row(place, kept, {language: [x for x in wrong if x.strip()] for language, wrong in negatives.items()})


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is missing or is not of the form {{language: ...}}")
    for language in value:
        _check(language, "a language code")
    return value


def _document(place: str, tree: dict[str, Any], default: str | None) -> Document | None:
    text = tree.get("text")
    if not isinstance(text, str | list):
        raise ValueError('"text" is missing or is neither a string nor a list of sentences')
    sentences = text if isinstance(text, list) else text.split("\n")
    for sentence in sentences:
        _check(sentence, "a sentence")
    language = tree.get("language", default)
    if language is None:
        raise ValueError('"language" is missing, and the source has no languages')
    _check(language, '"language"')
    kept = [sentence for sentence in sentences if sentence.strip()]
    return Document(place, language, kept) if kept else None


def _check(text: object, name: str) -> None:
    problem = lines.bad_text(text)
    if problem:
        raise ValueError(f"{name} {problem}")
