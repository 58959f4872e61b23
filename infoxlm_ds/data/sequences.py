"""Makes the token sequences that an encoder reads from the texts of a corpus.

Legend: T tokens, S sequences, n pairs.

In XLM-R's format a sequence is `<s> a </s>` or `<s> a </s></s> b </s>`. Other tokenizers have their own format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from infoxlm_ds.data.manifest import Tokenizer
from infoxlm_ds.data.packs import runs


@dataclass(frozen=True)
class Sequences:
    """S sequences, concatenated: ids [T] and lengths [S], both int64."""

    ids: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def concatenate(parts: Iterable[Sequences]) -> Sequences:
        """The sequences of all parts, in their order. There may be no part."""
        parts, empty = list(parts), np.zeros(0, np.int64)
        ids, lengths = [p.ids for p in parts], [p.lengths for p in parts]
        return Sequences(np.concatenate([empty, *ids]), np.concatenate([empty, *lengths]))

    @staticmethod
    def filled(lengths: np.ndarray, piece: int) -> Sequences:
        """Sequences that repeat one piece."""
        return Sequences(np.full(int(lengths.sum()), piece), lengths.astype(np.int64))


@dataclass(frozen=True)
class Texts:
    """The texts of S sequences, one or two each. Their ids begin at `starts` in a pool and have `lengths`, both
    [1 or 2, S]."""

    starts: np.ndarray
    lengths: np.ndarray


def assemble(pool: np.ndarray, texts: Texts, tokenizer: Tokenizer) -> Sequences:
    """Sequences of the texts in `pool`, with the tokenizer's special tokens."""
    starts, lengths = texts.starts, texts.lengths
    two = len(starts) == 2
    total = lengths.sum(0) + tokenizer.overhead(2 if two else 1)
    begin = np.cumsum(total) - total
    ids = np.full(int(total.sum()), tokenizer.special_ids["eos"], np.int64)
    ids[begin] = tokenizer.special_ids["bos"]
    ids[runs(begin + 1, lengths[0])] = pool[runs(starts[0], lengths[0])]
    if two:
        second = begin + 1 + lengths[0] + tokenizer.separators
        ids[runs(second, lengths[1])] = pool[runs(starts[1], lengths[1])]
    return Sequences(ids, total.astype(np.int64))


def mix(texts: Texts, crossing: bool, generator: np.random.Generator) -> tuple[Texts, Texts]:
    """First and second sides of mixup contrast (InfoXLM, section 3.3), from n pairs of texts ([2, n]).

    Pairs <c1, c2> and <d1, d2> become <c1 d1, c2 d2>. If `crossing` allows code-switched sides, they may also become
    <c1 d2, c2 d1>. The order within each side is drawn. Neighbours in the stream are partners. They are random and new
    in every epoch, unless the reader keeps neighbours of the corpus together.
    """
    n = texts.starts.shape[1] // 2
    c, d = np.arange(n) * 2, np.arange(n) * 2 + 1
    crossed = generator.integers(2, size=n) * crossing
    first, second = (_joined(texts, side, (c, d), crossed, generator) for side in (0, 1))
    return first, second


def _joined(
    texts: Texts, side: int, rows: tuple[np.ndarray, np.ndarray], crossed: np.ndarray, generator: np.random.Generator
) -> Texts:
    """Two texts for each sequence: this side of c, and this side of d or, if the sequence is
    crossed, d's other side."""
    c, d = rows
    chosen = [(np.full(len(c), side), c), (side ^ crossed, d)]
    flipped = generator.integers(2, size=len(c)).astype(bool)
    columns = []
    for table in (texts.starts, texts.lengths):
        of_c, of_d = (table[sides, row] for sides, row in chosen)
        columns.append(np.stack([np.where(flipped, of_d, of_c), np.where(flipped, of_c, of_d)]))
    return Texts(*columns)
