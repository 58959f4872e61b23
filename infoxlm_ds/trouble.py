"""The entries of docs/trouble.md, which a message of the program leads to.

In a clone, `infoxlm_ds/trouble.md` is a link to that page. A wheel holds a copy.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("trouble.md")


class Entry(NamedTuple):
    """A section of the page. `messages`: what the program prints then, as patterns."""

    title: str
    text: str
    messages: tuple[str, ...]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All of the page, in its order."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return tuple(Entry(text.partition("\n")[0], f"## {text}", _messages(text)) for text in sections)


def _messages(text: str) -> tuple[str, ...]:
    """One for each line of the blocks that quote the program. An ellipsis stands for anything."""
    lines = "".join(re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    return tuple(".*".join(map(re.escape, line.split("…"))) for line in lines)


def look_up(words: str) -> list[Entry]:
    """The entries with these words in the title, or else about such a message, or else with all words in the text."""
    wanted = words.lower()
    return (
        [entry for entry in entries() if wanted in entry.title.lower()]
        or [entry for entry in entries() if _about(entry, words)]
        or [entry for entry in entries() if all(word in entry.text.lower() for word in wanted.split())]
    )


def pointer(message: str) -> str:
    """The command that shows the entry about this message, to be printed behind it; nothing if there is none."""
    found = [entry.title.lower() for entry in entries() if _about(entry, message)]
    return f' (more: infoxlm trouble "{found[0]}")' if found else ""


def complain(message: str) -> None:
    """Print why a command or a run ends, on standard error."""
    print(f"infoxlm: {message}{pointer(message)}", file=sys.stderr, flush=True)


def _about(entry: Entry, message: str) -> bool:
    return any(re.search(pattern, message, re.DOTALL) for pattern in entry.messages)
