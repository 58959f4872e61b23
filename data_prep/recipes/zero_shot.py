"""Writes two tasks with labels, in all languages of the embedded corpus, for `infoxlm finetune`.

python -m data_prep.recipes.zero_shot OUT

OUT/roles: what a message is for (an error, a state, the name of a field, ...), from its key. Trained in English.
OUT/matching: is the second sentence a translation of the first, or of another message? Trained in English and German.

Messages of training come from the rows that pre-training reads; test messages come from the held-out rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from infoxlm_ds.atomic import write_file
from infoxlm_ds.shipped import TEXTS

DEV = 16  # one of so many rows of training is for choosing the best epoch
LEAST = 50  # test examples of a language
LINE_ENDS = str.maketrans("\t\n\r", "   ")
Row = tuple[str, dict[str, str]]
Example = tuple[str, ...]  # sentences and a label


def main() -> int:
    """Write both tasks. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    train, test = (read_rows(TEXTS[f"home_assistant.{part}"]) for part in ("train", "dev"))
    dev = [row for row in train if _drawn("split", row[0], DEV) == 0]
    train = [row for row in train if _drawn("split", row[0], DEV)]
    languages = sorted({code for _, texts in test for code in texts})
    for split, rows in (("train", train), ("dev", dev)):
        _write(out / "roles" / f"{split}-en.tsv", list(roles(rows, "en")))
        _write(out / "matching" / f"{split}-de.tsv", list(matching(rows, "de")))
    for code in languages:
        _write(out / "roles" / f"test-{code}.tsv", list(roles(test, code)), LEAST)
        if code != "en":
            _write(out / "matching" / f"test-{code}.tsv", list(matching(test, code)), LEAST)
    return 0


def read_rows(path: Path) -> list[Row]:
    """Key and texts of each message, ordered by key, so that messages that belong together are neighbours."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [(row["key"], row["text"]) for row in map(json.loads, file)]
    return sorted((key, {code: text.translate(LINE_ENDS) for code, text in texts.items()}) for key, texts in rows)


def role(key: str) -> str | None:
    """What a message is for. None if the key does not say it."""
    *_, before, last = ("", *key.split("."))
    names = set(key.split("."))
    if key.startswith("f:"):  # the frontend's keys follow no rule
        return None
    if before == "error" or "exceptions" in names:
        return "error"
    if before == "abort":
        return "abort"
    if before == "data_description":
        return "help"
    if before == "data":
        return "field"
    if before == "state":
        return "state"
    return last if last in ("description", "name", "title") else None


def roles(rows: Sequence[Row], code: str) -> Iterator[Example]:
    """A message and its role."""
    for key, texts in rows:
        if code in texts and (label := role(key)):
            yield texts[code], label


def matching(rows: Sequence[Row], code: str) -> Iterator[Example]:
    """An English message with its translation or, just as often, with that of the next message that differs."""
    both = [(key, texts["en"], texts[code]) for key, texts in rows if "en" in texts and code in texts]
    for number, (key, english, translation) in enumerate(both):
        others = (text for _, other, text in both[number + 1 : number + 9] if other != english and text != translation)
        sibling = next(others, None)
        if sibling is None or _drawn("side", key, 2):
            yield english, translation, "translation"
        else:
            yield english, sibling, "sibling"


def _drawn(what: str, key: str, count: int) -> int:
    """A number below `count` that depends on the key, and in another way for each `what`."""
    return int.from_bytes(hashlib.blake2b(f"{what} {key}".encode(), digest_size=8).digest()) % count


def _write(path: Path, examples: Sequence[Example], least: int = 1) -> None:
    if len(examples) < least:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join("\t".join(example) + "\n" for example in examples))
    print(f"{path}: {len(examples):,} examples")


if __name__ == "__main__":
    sys.exit(main())
