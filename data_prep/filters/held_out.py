"""The filter of texts that a held-out file has, such as a development set."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.clean import clean
from data_prep.filters.settings import HeldOut
from data_prep.filters.words import words
from infoxlm_ds.data.packs import content_id, text_id
from infoxlm_ds.data.text import lines, read_nway


class HeldOutFilter:
    """Says whether a text is held out. The files are read once a process. UserError names a file that cannot be
    read."""

    def __init__(self, settings: HeldOut, folder: Path) -> None:
        files = tuple(folder / path for path in settings.files)
        self._settings = settings
        self._texts, self._grams = _load(files, settings.words, settings.from_words)

    def is_held_out(self, text: str) -> bool:
        """Equal to a held-out text but for case and compatible characters, or, if it is long, largely made of n-grams
        of held-out texts."""
        if _has(self._texts, text_id(text)):
            return True
        grams = _grams(text, self._settings.words, self._settings.from_words)
        return sum(_has(self._grams, gram) for gram in grams) > self._settings.share * len(grams)


@functools.lru_cache(maxsize=1)
def _load(files: tuple[Path, ...], n: int, from_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes, uint64, of the texts and of the n-grams of the long ones."""
    texts: set[int] = set()
    grams: set[int] = set()
    for text in (clean(text) for file in files for text in _read(file)):
        texts.add(text_id(text))
        grams.update(_grams(text, n, from_words))
    return np.array(sorted(texts), np.uint64), np.array(sorted(grams), np.uint64)


def _read(file: Path) -> Iterator[str]:
    if ".jsonl" in file.suffixes:
        yield from (text for row in read_nway(file) for text in row.values())
    else:
        yield from (line for _, line in lines(file) if line.strip())


def _grams(text: str, n: int, from_words: int) -> list[int]:
    text = unicodedata.normalize("NFKC", text).casefold()
    found = words(text)
    if len(found) == len(text):  # characters say less than words
        n, from_words = 2 * n, 2 * from_words
    if len(found) < from_words:
        return []
    return [content_id(" ".join(found[start : start + n]).encode()) for start in range(len(found) - n + 1)]


def _has(hashes: np.ndarray, wanted: int) -> bool:
    place = int(np.searchsorted(hashes, np.uint64(wanted)))
    return place < len(hashes) and int(hashes[place]) == wanted
