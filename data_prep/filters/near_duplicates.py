"""Finds texts that are nearly equal, over a whole source: MinHash (Broder, 1997) in bands.

Legend: n texts, B bands, R rows of a band.
"""

from __future__ import annotations

import numpy as np

BANDS, ROWS = 14, 8  # texts with a Jaccard similarity of 0.72 meet in a band two times out of three
SHINGLE = 5  # characters
CHUNK = 500  # texts


def signatures(texts: list[str], bands: int = BANDS, rows: int = ROWS) -> np.ndarray:
    """The keys of the bands of each text, uint64 [n, B]. Texts that share a key are near-duplicates. The similarity
    is that of their sets of five consecutive characters, without case."""
    keys = [_keys(texts[start : start + CHUNK], bands, rows) for start in range(0, len(texts), CHUNK)]
    return np.concatenate([np.zeros((0, bands), np.uint64), *keys])


def duplicates(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """bool [n]: which texts go. Of texts that are linked by shared keys [n, B], the one with the smallest `order` [n]
    stays; orders differ."""
    texts = np.argsort(order, kind="stable")
    groups = [np.unique(band, return_inverse=True)[1] for band in keys[texts].T]
    first = np.arange(len(keys))  # the smallest text that each is known to be linked with; texts in their order
    while True:
        before = first
        for group in groups:
            smallest = np.full(len(keys), len(keys))
            np.minimum.at(smallest, group, first)
            first = smallest[group]
        first = first[first]
        if (first == before).all():
            break
    found = np.empty(len(keys), bool)
    found[texts] = first != np.arange(len(keys))
    return found


def _keys(texts: list[str], bands: int, rows: int) -> np.ndarray:
    folded = [text.casefold() or " " for text in texts]
    lengths = np.array([len(text) for text in folded])
    starts = np.cumsum(lengths) - lengths
    hashes = _shingles(folded, lengths)
    parameters = (_mix(np.arange(2 * bands * rows, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
    minima = np.empty((len(texts), bands * rows), np.uint64)  # of each of the hash functions of MinHash
    for number, (a, b) in enumerate(parameters.reshape(-1, 2)):
        minima[:, number] = np.minimum.reduceat(hashes * (a | np.uint32(1)) ^ b, starts)
    keys = np.arange(bands, dtype=np.uint64).repeat(len(texts)).reshape(bands, -1).T
    for row in range(rows):
        keys = _mix(keys ^ minima[:, row::rows])
    return keys


def _shingles(texts: list[str], lengths: np.ndarray) -> np.ndarray:
    """Hashes, uint32, of the shingles of each text, one after the other; a text has as many as characters."""
    padded = "".join("\0" * (SHINGLE - 1) + text for text in texts)
    characters = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(characters, SHINGLE)
    padding = np.repeat(np.arange(len(texts)) * (SHINGLE - 1), lengths)
    places = np.arange(lengths.sum()) + padding
    hashes = np.zeros(len(places), np.uint64)
    for column in range(SHINGLE):
        hashes = _mix(hashes ^ windows[places, column])
    return (hashes >> np.uint64(32)).astype(np.uint32)


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads each bit (the finaliser of splitmix64)."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
