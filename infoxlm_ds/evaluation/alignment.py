"""Word alignment from the token states of an encoder: do words find their translations in a sentence pair?

Two words are linked if a token of one and a token of the other are each other's nearest by cosine (SimAlign's Argmax:
Jalili Sabet et al., 2020, section 2.1). The links are compared with those that people made (Och and Ney, 2003).

Legend: T tokens, D width, S and P: sure and possible links of people, A: ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize

from infoxlm_ds.config import UserError
from infoxlm_ds.data.flat_batch import flat_batch
from infoxlm_ds.data.text import aligned, lines
from infoxlm_ds.data.upload import to_device
from infoxlm_ds.evaluation.embed import device_of, load_folder
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.evaluation.progress import blocks
from infoxlm_ds.model.encoder import Body
from infoxlm_ds.model.families import positions_of

Links = set[tuple[int, int]]
BATCH = 64  # sentence pairs
LINK = re.compile(r"(\d+)([-p?])(\d+)")  # - sure; p or ? possible
NUMBERED = re.compile(r"(\d+)\s+(\d+)\s+(\d+)(?:\s+([SP]))?")


@dataclass(frozen=True)
class Gold:
    """The links of a sentence pair, numbered from 0: `possible` contains `sure`."""

    sure: Links
    possible: Links


@dataclass(frozen=True)
class AlignmentRow:
    """Scores at one layer: precision |A and P| / |A|, recall |A and S| / |S|, and the alignment error rate
    1 - (|A and S| + |A and P|) / (|A| + |S|)."""

    layer: int
    pairs: int
    precision: float
    recall: float
    error_rate: float


class Scores:
    """Counts of links over many sentence pairs."""

    def __init__(self) -> None:
        self.ours = self.sure = self.hit_sure = self.hit_possible = self.pairs = 0

    def add(self, links: Links, gold: Gold) -> None:
        """Count the links of a sentence pair."""
        self.pairs += 1
        self.ours += len(links)
        self.sure += len(gold.sure)
        self.hit_sure += len(links & gold.sure)
        self.hit_possible += len(links & gold.possible)

    def row(self, layer: int) -> AlignmentRow:
        """The scores so far, as those of a layer."""
        return AlignmentRow(
            layer=layer,
            pairs=self.pairs,
            precision=self.hit_possible / max(self.ours, 1),
            recall=self.hit_sure / max(self.sure, 1),
            error_rate=1 - (self.hit_sure + self.hit_possible) / max(self.ours + self.sure, 1),
        )


def evaluate_alignment(
    model: Path, texts: tuple[Path, Path], gold: Path, first: int, layer: int | None
) -> list[AlignmentRow]:
    """A row for each layer, or for one. `texts`: words separated by spaces, a sentence a line. `gold`: see `read_gold`;
    `first`: the number of the first word there. UserError for files that are not aligned or have another form, and as
    in `load_folder`."""
    pairs = read_pairs(*texts)
    links = read_gold(gold, first, [(len(one), len(other)) for one, other in pairs])
    states = TokenStates(model, layer)
    scores = [Scores() for _ in states.layers]
    for part in blocks(len(pairs), BATCH, "aligning"):
        sides = [states.of([pair[side] for pair in pairs[part]]) for side in (0, 1)]
        for number, (one, other) in enumerate(zip(*sides, strict=True), part.start):
            for score, left, right in zip(scores, one.vectors, other.vectors, strict=True):
                score.add(mutual_links(left, right, one.words, other.words), links[number])
    return [score.row(number) for score, number in zip(scores, states.layers, strict=True)]


@dataclass(frozen=True)
class Sentence:
    """`vectors`: L2-normalised states [layers, T, D] of the tokens of all words; `words` [T]: each one's word."""

    vectors: Vectors
    words: npt.NDArray[np.int64]


class TokenStates:
    """Token states of sentences that are given as words, of one layer or all."""

    def __init__(self, folder: Path, layer: int | None) -> None:
        self._device = device_of(None)
        model, self._tokenizer = load_folder(folder)
        last = model.config.num_hidden_layers
        if layer is not None and not 0 <= layer <= last:
            raise UserError(f"layer {layer} is out of range: {folder} has layers 0 (embeddings) to {last}")
        self.layers = list(range(last + 1)) if layer is None else [layer]
        self._longest = min(self._tokenizer.model_max_length, positions_of(model.config))
        self._body = Body(model.to(self._device).eval(), self.layers[-1])

    @torch.inference_mode()
    def of(self, sentences: Sequence[Sequence[str]]) -> list[Sentence]:
        """The states of each sentence. Words beyond the model's longest sequence have none."""
        encoded: Any = self._tokenizer(
            [list(words) for words in sentences], is_split_into_words=True, truncation=True, max_length=self._longest
        )
        ids = [np.array(of, np.int32) for of in encoded["input_ids"]]
        flat = to_device(flat_batch(np.concatenate(ids), np.array([len(of) for of in ids])), self._device)
        states = torch.stack([hidden for i, hidden in enumerate(self._body.states(flat)) if i in self.layers])
        vectors = normalize(states.float(), dim=-1).cpu().numpy()
        found, end = [], 0
        for number, of in enumerate(ids):
            start, end = end, end + len(of)
            words = np.array([-1 if word is None else word for word in encoded.word_ids(number)], np.int64)
            found.append(Sentence(vectors[:, start:end][:, words >= 0], words[words >= 0]))
        return found


def mutual_links(one: Vectors, other: Vectors, words: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> Links:
    """The links of words whose tokens, [T, D] and [T', D], are each other's nearest."""
    if not len(one) or not len(other):
        return set()
    cosine = one @ other.T
    forward, backward = cosine.argmax(1), cosine.argmax(0)
    mutual = np.flatnonzero(backward[forward] == np.arange(len(one)))
    return set(zip(words[mutual].tolist(), others[forward[mutual]].tolist(), strict=True))


def read_pairs(one: Path, other: Path) -> list[tuple[list[str], list[str]]]:
    """The words of two files that go line by line. UserError if one is shorter, or empty."""
    pairs = [(left.split(), right.split()) for left, right in aligned(one, other)]
    if not pairs:
        raise UserError(f"{one} has no text")
    return pairs


def read_gold(path: Path, first: int, lengths: Sequence[tuple[int, int]]) -> list[Gold]:
    """The links of each sentence pair, in one of two forms: a line `0-0 1-2 3p4` for each pair (Pharaoh, talp; p or ?
    for possible links), or a line `SENTENCE WORD WORD [S|P]` for each link, sentences numbered from 1 (NAACL 2003).
    `lengths`: words of each pair. UserError names a line that has another form, or a word that is not there."""
    found = [Gold(set(), set()) for _ in lengths]
    pair = links = 0
    for number, line in lines(path):
        where = f"{path} line {number}"
        if numbered := NUMBERED.fullmatch(line.strip()):
            sentence, left, right = (int(part) for part in numbered.groups()[:3])
            parsed, links = [(sentence - 1, left, right, numbered[4] != "P")], links + 1
        elif line.strip() or not links:  # a blank line is a pair without links, but nothing in NAACL's form
            parsed = [(pair, left, right, sure) for left, right, sure in _links(line, where)]
            pair += 1
            if pair > len(lengths):
                raise UserError(f"{where}: the texts have {len(lengths)} sentence pairs only")
        else:
            continue
        for of, left, right, sure in parsed:
            if not 0 <= of < len(lengths):
                raise UserError(f"{where}: sentence {of + 1}, but the texts have {len(lengths)}")
            link = left - first, right - first
            if not all(0 <= word < length for word, length in zip(link, lengths[of], strict=True)):
                raise UserError(
                    f"{where}: no words {left} and {right} in sentence {of + 1}, whose sides have "
                    f"{' and '.join(map(str, lengths[of]))}: is the first word number {1 - first}?"
                )
            found[of].possible.add(link)
            if sure:
                found[of].sure.add(link)
    if pair and pair < len(lengths):
        raise UserError(f"{path} has links of {pair} sentence pairs, but the texts have {len(lengths)}")
    if not any(gold.sure for gold in found):
        raise UserError(f"{path} has no sure link")
    return found


def _links(line: str, where: str) -> Iterator[tuple[int, int, bool]]:
    for word in line.split():
        link = LINK.fullmatch(word)
        if link is None:
            raise UserError(f"{where}: {word!r} is no link: expected such as 0-0 or 3p4, or SENTENCE WORD WORD [S|P]")
        yield int(link[1]), int(link[3]), link[2] == "-"


def print_alignment(rows: Sequence[AlignmentRow], console: Console) -> None:
    """A table with a line for each layer."""
    table = Table(title=f"word alignment, {rows[0].pairs:,} sentence pairs", box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("layer", "precision", "recall", "error rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row.layer), *(f"{value:.3f}" for value in (row.precision, row.recall, row.error_rate)))
    console.print(table)
