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
from data_prep.sources.lines import bad_text


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
    kept = {}
    for language, sentence in texts.items():
        if problem := bad_text(sentence):
            raise ValueError(f"the sentence of {language!r} {problem}")
        if sentence.strip():
            kept[language] = sentence
    return Row(place, kept, _negatives(tree["negatives"])) if "negatives" in tree else Row(place, kept)


def _negatives(value: object) -> dict[str, list[str]]:
    negatives = _mapping(value, '"negatives"')
    for language, wrong in negatives.items():
        if not isinstance(wrong, list):
            raise ValueError(f"the negatives of {language!r} are not a list")
        if problem := next(filter(None, map(bad_text, wrong)), ""):
            raise ValueError(f"a negative of {language!r} {problem}")
    return {language: [text for text in wrong if text.strip()] for language, wrong in negatives.items()}


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is missing or is not of the form {{language: ...}}")
    if problem := bad_text("".join(value)):
        raise ValueError(f"a language code of {name} {problem}")
    return value


def _document(place: str, tree: dict[str, Any], default: str | None) -> Document | None:
    text, language = tree.get("text"), tree.get("language", default)
    if not isinstance(text, str | list):
        raise ValueError('"text" is missing or is neither a string nor a list of sentences')
    if language is None:
        raise ValueError('"language" is missing, and the source has no languages')
    sentences = text if isinstance(text, list) else text.split("\n")
    if problem := next(filter(None, map(bad_text, sentences)), ""):
        raise ValueError(f"a sentence {problem}")
    if problem := bad_text(language):
        raise ValueError(f'"language" {problem}')
    kept = [sentence for sentence in sentences if sentence.strip()]
    return Document(place, language, kept) if kept else None
