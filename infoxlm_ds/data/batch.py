"""The joint batch: one flat sequence batch for all three losses, assembled from the rows of the three streams.

Legend: T tokens, S sequences, M masked rows, B pairs, I text ids an item.

Layout of the sequences: MMLM blocks, TLM pairs, then XlCo queries, which leave the encoder at the universal layer.
In XLM-R's format they are `<s> a </s>` and `<s> a </s></s> b </s>`; other tokenizers have their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from infoxlm_ds.config import Contrast, Recipe, UserError
from infoxlm_ds.data.manifest import Tokenizer
from infoxlm_ds.data.masking import Masked, mask_pieces
from infoxlm_ds.data.plan import keyed_generator
from infoxlm_ds.data.reader import Corpus, Grouping, Rows, StreamReader, runs

# Text ids an item, by mixup: two sides and what all translations of the row share.
N_TEXTS = {"off": 3, "paper": 6, "reference": 6}


@dataclass(frozen=True)
class Sequences:
    """S sequences one behind the other: ids [T] and lengths [S], both int64."""

    ids: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class JointBatch:
    """One lane's micro-batch.

    `tokens`: the first `trunk` sequences are MMLM's and TLM's, the rest XlCo queries: [B], or both sides, [2 B], first
    sides first. `rows` and `labels` [M]: masked tokens, the first `mmlm` of them MMLM's. `keys`: what the key encoder
    reads, [B] second sides or [2 B] both; None where keys have a gradient. `text_ids` [B, I] int64. `names`: by task
    each item's language or pair of languages; XlCo's are [B, 1], or [B, 2] of mixed pairs.
    """

    tokens: Sequences
    trunk: int
    rows: np.ndarray
    labels: np.ndarray
    mmlm: int
    keys: Sequences | None
    text_ids: np.ndarray
    names: dict[str, np.ndarray]

    @property
    def counts(self) -> dict[str, int]:
        """What each task's mean is taken over: masked pieces, masked pieces, pairs."""
        return {"mmlm": self.mmlm, "tlm": len(self.labels) - self.mmlm, "xlco": len(self.text_ids)}


class BatchBuilder:
    """Takes rows from the three streams and makes a lane's next joint batch."""

    def __init__(self, recipe: Recipe, corpus: Corpus, own_lanes: list[int]) -> None:
        self._recipe, self._corpus = recipe, corpus
        self._tokenizer = corpus.manifest.tokenizer
        self._regular = np.ones(self._tokenizer.vocab_size, bool)
        self._regular[list(self._tokenizer.special_ids.values())] = False
        sampling = recipe.sampling
        self.readers = {
            task: StreamReader(
                corpus,
                task,
                seed=recipe.seed,
                alpha=sampling.alpha,
                lanes=recipe.batch.lanes,
                window_packs=sampling.window_packs,
                own_lanes=own_lanes,
                pivot=sampling.pivot,
                pivot_share=sampling.pivot_share,
                grouping=_grouping(recipe.contrast) if task == "xlco" else Grouping(),
            )
            for task, used in recipe.tasks.items()
            if used
        }
        self._check_size()

    def build(self, lane: int, step: int) -> JointBatch:
        """The micro-batch of `lane` at `step`; masks and mixup are keyed by both."""
        trunk, masked, names = [], [], {}
        sizes = {
            "mmlm": (self._recipe.batch.mmlm_tokens, self._tokenizer.overhead(1)),
            "tlm": (self._recipe.batch.tlm_tokens, self._tokenizer.overhead(2)),
        }
        for task, (tokens, overhead) in sizes.items():
            if task not in self.readers:
                continue
            rows = self.readers[task].take(lane, tokens=tokens, overhead=overhead)
            trunk.append(assemble(rows.pool, rows.starts, rows.lengths, self._tokenizer))
            masked.append((task, self._mask(trunk[-1].ids, self._generator(task, lane, step))))
            names[task] = self._names(rows)
        queries, keys, text_ids, rows_of_pairs = self._pairs(lane, step)
        if rows_of_pairs is not None:
            names["xlco"] = self._names(rows_of_pairs).reshape(len(text_ids), -1)
        shift = np.cumsum([0] + [len(one.ids) for one in trunk])
        rows_at = [m.rows + shift[i] for i, (_, m) in enumerate(masked)]
        tokens_in = _concatenate(
            [Sequences(m.ids, s.lengths) for (_, m), s in zip(masked, trunk, strict=True)] + [queries]
        )
        return JointBatch(
            tokens_in,
            sum(len(one) for one in trunk),
            np.concatenate([np.zeros(0, np.int64), *rows_at]),
            np.concatenate([np.zeros(0, np.int64), *(m.labels for _, m in masked)]),
            sum(len(m.labels) for task, m in masked if task == "mmlm"),
            keys,
            text_ids,
            names,
        )

    def longest(self) -> JointBatch:
        """A micro-batch that takes as much memory as any of the recipe's can: budgets used up, pairs of the longest
        texts, as many masked pieces as chance ever gives. Its contents mean nothing."""
        one, two = _longest(self._corpus, 1), _longest(self._corpus, 2)
        recipe = self._recipe
        batch, tasks, probability = recipe.batch, recipe.tasks, recipe.masking.probability
        trunk, masked = [], []
        for task, budget, longest in (("mmlm", batch.mmlm_tokens, one), ("tlm", batch.tlm_tokens, two)):
            filled = max(budget, longest) if tasks[task] else 0
            trunk += [longest] * (filled // longest) + [filled % longest] * (filled % longest > 0)
            often = probability * filled + 5 * (probability * filled) ** 0.5  # five standard deviations
            masked.append(min(filled, int(often)))
        pairs = batch.xlco_pairs if tasks["xlco"] else 0
        contrast = recipe.contrast
        side = np.full(pairs, one if contrast.mixup == "off" else two)
        queries = np.tile(side, 2 if contrast.keys == "gradient" or contrast.symmetric else 1)
        lengths = np.concatenate([np.array(trunk, np.int64), queries])
        keys = None if contrast.keys == "gradient" else np.tile(side, 2 if contrast.symmetric else 1)
        piece = self._tokenizer.special_ids["unk"]
        n_ids = N_TEXTS[contrast.mixup]
        return JointBatch(
            _filled(lengths, piece),
            len(trunk),
            np.arange(sum(masked)) % max(1, sum(trunk)),
            np.full(sum(masked), piece),
            masked[0],
            None if keys is None else _filled(keys, piece),
            np.arange(pairs * n_ids).reshape(pairs, n_ids),
            {},
        )

    def _check_size(self) -> None:
        """UserError where one step would read the corpus more than once."""
        batch, twice = self._recipe.batch, 1 if self._recipe.contrast.mixup == "off" else 2
        for task, reader in self.readers.items():
            name, has = ("xlco_pairs", reader.items) if task == "xlco" else (f"{task}_tokens", reader.tokens)
            needs = getattr(batch, name) * batch.lanes * (twice if task == "xlco" else 1)
            if needs > has:
                raise UserError(
                    f"a step of batch.{name} {getattr(batch, name)} on {batch.lanes} lanes reads {needs}, the corpus "
                    f"{self._corpus.path} has {has}: set a smaller batch.{name} or bring more text"
                )

    def _pairs(self, lane: int, step: int) -> tuple[Sequences, Sequences | None, np.ndarray, Rows | None]:
        if "xlco" not in self.readers:
            return _concatenate([]), None, np.zeros((0, N_TEXTS[self._recipe.contrast.mixup]), np.int64), None
        contrast, pairs = self._recipe.contrast, self._recipe.batch.xlco_pairs
        mixing = contrast.mixup != "off"
        rows = self.readers["xlco"].take(lane, items=pairs * (2 if mixing else 1))
        starts, lengths = rows.starts, rows.lengths
        text_ids = rows.text_ids.T.astype(np.int64)
        if mixing:
            sides = _mixed(starts, lengths, contrast.mixup == "paper", self._generator("mixup", lane, step))
            text_ids = text_ids.reshape(pairs, -1)
        else:
            sides = [(starts[side : side + 1], lengths[side : side + 1]) for side in (0, 1)]
        first, second = (assemble(rows.pool, *side, self._tokenizer) for side in sides)
        both = _concatenate([first, second])
        gradient = contrast.keys == "gradient"
        queries = both if gradient or contrast.symmetric else first
        return queries, None if gradient else (both if contrast.symmetric else second), text_ids, rows

    def _mask(self, ids: np.ndarray, generator: np.random.Generator) -> Masked:
        mask_id = self._tokenizer.special_ids["mask"]
        return mask_pieces(ids, self._regular, mask_id, self._recipe.masking, generator)

    def _generator(self, use: str, lane: int, step: int) -> np.random.Generator:
        return keyed_generator(self._recipe.seed, use, lane, step)

    def _names(self, rows: Rows) -> np.ndarray:
        """Each item's language or, whatever its direction, pair of languages."""
        names = np.array(self._corpus.languages)[np.sort(rows.languages, axis=0)]
        return names[0] if len(names) == 1 else names[0] + np.array("-") + names[1]


def _grouping(contrast: Contrast) -> Grouping:
    return Grouping(contrast.pairs_per_row, neighbours=contrast.mixup == "reference")


def assemble(pool: np.ndarray, starts: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer) -> Sequences:
    """Sequences from one or two texts each, which lie in `pool` at `starts` [1 or 2, S] with `lengths` [1 or 2, S]."""
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


def _mixed(
    starts: np.ndarray, lengths: np.ndarray, crossing: bool, generator: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mixup contrast (InfoXLM, section 3.3): pairs <c1, c2> and <d1, d2> become <c1 d1, c2 d2> or, where `crossing`
    allows code-switched sides, <c1 d2, c2 d1>, the order within each side by chance. Neighbours in the stream are
    partners: random ones, new every epoch, unless the reader keeps the corpus' own neighbours together."""
    n = starts.shape[1] // 2
    c, d = np.arange(n) * 2, np.arange(n) * 2 + 1
    crossed = generator.integers(2, size=n) * crossing
    sides = []
    for side in (0, 1):
        texts = [(np.full(n, side), c), (side ^ crossed, d)]
        flipped = generator.integers(2, size=n).astype(bool)
        picked = []
        for table in (starts, lengths):
            one, two = (table[which, row] for which, row in texts)
            picked.append(np.stack([np.where(flipped, two, one), np.where(flipped, one, two)]))
        sides.append((picked[0], picked[1]))
    return sides


def _concatenate(parts: list[Sequences]) -> Sequences:
    empty = np.zeros(0, np.int64)
    return Sequences(
        np.concatenate([empty, *(p.ids for p in parts)]), np.concatenate([empty, *(p.lengths for p in parts)])
    )


def longest_sequence(recipe: Recipe, corpus: Corpus) -> int:
    """Tokens of the longest sequence a recipe can make of a corpus, special tokens included."""
    two = recipe.tasks["tlm"] or recipe.contrast.mixup != "off"
    return _longest(corpus, 2 if two else 1)


def _longest(corpus: Corpus, texts: Literal[1, 2]) -> int:
    return texts * corpus.manifest.max_tokens + corpus.manifest.tokenizer.overhead(texts)


def _filled(lengths: np.ndarray, piece: int) -> Sequences:
    return Sequences(np.full(int(lengths.sum()), piece), lengths.astype(np.int64))
