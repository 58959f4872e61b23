"""Writes the translations in the `homeassistant` wheel as n-way text: one message a line, in all its languages.

pip download --no-deps --ignore-requires-python homeassistant==2026.11.0
python -m data_prep.recipes.home_assistant homeassistant-2026.11.0-*.whl rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import UserError

CATALOGUE = re.compile(r"homeassistant/components/([^/]+)/translations/(.+)\.json")


def main() -> int:
    """Write the rows of a wheel. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, help="JSON lines for a source of format jsonl and kind nway")
    options = parser.parse_args()
    try:
        rows = read_wheel(options.wheel)
    except UserError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    lines = (json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n" for key, text in rows.items())
    write_file(options.out, "".join(lines))
    pairs = sum(len(text) - 1 for text in rows.values())
    languages = len({code for text in rows.values() for code in text})
    print(f"{options.out}: {len(rows):,} messages, {pairs:,} pairs with English, {languages} languages")
    return 0


def read_wheel(path: Path) -> dict[str, dict[str, str]]:
    """The messages that exist in English and another language, by key. UserError if the file is no such wheel."""
    rows: dict[str, dict[str, str]] = {}
    try:
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if match := CATALOGUE.fullmatch(name):
                    component, language = match.groups()
                    for key, text in _leaves(json.loads(wheel.read(name)), f"component.{component}"):
                        rows.setdefault(key, {})[language] = text
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{path}: not a homeassistant wheel that can be read: {error}") from None
    kept = {key: text for key, text in sorted(rows.items()) if "en" in text and len(text) > 1}
    if not kept:
        raise UserError(f"{path}: no translations in it: download homeassistant from PyPI")
    return kept


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for name, below in tree.items():
            yield from _leaves(below, f"{key}.{name}")
    elif isinstance(tree, str) and tree.strip():
        yield key, tree


if __name__ == "__main__":
    sys.exit(main())
