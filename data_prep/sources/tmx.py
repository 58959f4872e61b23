"""Translation memories (TMX): a unit `<tu>` is a row; each of its `<tuv xml:lang="xx">` is a side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree

from data_prep.description import SourceDescription
from data_prep.rows import Block, Fault, Item, Row
from data_prep.sources import files

LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
# What these elements hold is the markup of another format, not text.
MARKUP = ("bpt", "ept", "it", "ph", "ut")


def blocks(source: SourceDescription, base: Path, size: int) -> Iterator[Block]:
    """One block for each file."""
    return files.one_block_each(source.path, base)


def read(source: SourceDescription, block: Block) -> Iterator[Item]:
    (part,) = block.parts
    with files.plain(part) as file:
        # Entities stay as they are and nothing is fetched. Without huge_tree, libxml2 refuses texts above 10 MB.
        units = etree.iterparse(
            file, tag="tu", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
        )
        number = 0
        while True:
            try:
                _, unit = next(units, (None, None))
            except (etree.XMLSyntaxError, *files.DAMAGED) as error:
                raise files.damage(f"{part.file} after unit {number}", error) from None
            if unit is None:
                return
            number += 1
            yield _row(f"{part.file} unit {number}", unit)
            _forget(unit)


def _row(place: str, unit: Any) -> Row | Fault:
    """Of two sides in one language, the first counts."""
    texts: dict[str, str] = {}
    for side in unit.iterfind("tuv"):
        language, segment = side.get(LANGUAGE) or side.get("lang"), side.find("seg")
        if not language:
            return Fault(place, "a <tuv> has no xml:lang")
        if segment is None:
            return Fault(place, f"the <tuv> of {language!r} has no <seg>")
        text = _text(segment)
        if text.strip():
            texts.setdefault(language, text)
    return Row(place, texts)


def _text(element: Any) -> str:
    """The text of an element and of what is in it, without markup, comments and entities of the file's own."""
    parts = [element.text or ""]
    for child in element:
        if isinstance(child.tag, str) and child.tag not in MARKUP:
            parts.append(_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _forget(unit: Any) -> None:
    """Free the memory of a unit, and of what stands before it."""
    unit.clear(keep_tail=False)
    parent = unit.getparent()
    while parent is not None and parent[0] is not unit:
        del parent[0]
