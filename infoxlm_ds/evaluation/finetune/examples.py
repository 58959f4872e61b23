"""What the files of a task hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One or two sentences and one label; the words of a sentence and a label each; or a question and its context,
    whose labels are the answers that count as right.

    `numbers`: the lines of the labels in the file `path`; for answers, where they begin in the context.
    """

    path: Path
    numbers: list[int]
    texts: list[str]
    labels: list[str]
