"""The joint batch: one flat batch for all three losses, and all that a lane's pass reads, as tensors.

A lane is one micro-batch of a step. It is the same whatever rank runs it.

Legend: T tokens, S sequences, M masked rows, B pairs of this lane, I text ids an item.

Order of the sequences: MMLM blocks, TLM pairs, then XlCo queries, which leave the encoder at the universal layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds.config import Contrast, Recipe, UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.flat_batch import FlatBatch, Layout, flat_batch, make_layout
from infoxlm_ds.data.masking import Masked, mask_pieces
from infoxlm_ds.data.order import keyed_generator
from infoxlm_ds.data.sequences import Sequences, Texts, assemble, mix
from infoxlm_ds.data.stream import Grouping, Rows, StreamReader
from infoxlm_ds.data.upload import to_device

# Text ids an item, by mixup: two sides and what all translations of the row share.
N_TEXTS = {"off": 3, "paper": 6, "reference": 6}
X = TypeVar("X")


class Sides(NamedTuple, Generic[X]):
    """Something of the first sides of pairs, and the same of their second sides."""

    first: X
    second: X


def split_sides(rows: Tensor, counts: Sides[int]) -> Sides[Tensor]:
    """Rows of first sides and, behind them, of second sides, apart."""
    return Sides(*rows.split(list(counts)))


@dataclass(frozen=True)
class JointBatch:
    """One lane's micro-batch, ready for its pass.

    `tokens`: MMLM's and TLM's sequences, the trunk, and behind them XlCo's queries; `trunk` and `queries` are the
    layouts of either alone. `rows` and `labels` [M] int64: masked tokens, the first `mmlm` of them MMLM's. `sides`: how
    many queries are first and second sides; `keys`, `key_sides`: the same of what the key encoder reads, None where
    keys have a gradient. A count is B, or 0 where the side takes no part. `text_ids` [B, I] int64. `names`: by task
    each item's language or pair of languages; XlCo's are [B, 1], or [B, 2] of mixed pairs.
    """

    tokens: FlatBatch
    trunk: Layout
    queries: Layout
    sides: Sides[int]
    keys: FlatBatch | None
    key_sides: Sides[int]
    rows: Tensor
    labels: Tensor
    mmlm: int
    text_ids: Tensor
    names: dict[str, np.ndarray]

    @property
    def counts(self) -> dict[str, int]:
        """What each task's mean is taken over: masked pieces, masked pieces, pairs."""
        return {"mmlm": self.mmlm, "tlm": len(self.labels) - self.mmlm, "xlco": len(self.text_ids)}

    @property
    def queries_alone(self) -> FlatBatch:
        """The queries as a batch of their own. Their layout has dense groups only where such a pass is to come."""
        return FlatBatch(self.tokens.ids[self.trunk.tokens :], self.queries)

    def to(self, device: torch.device) -> JointBatch:
        """By one upload."""
        return to_device(self, device)


class _Pairs(NamedTuple):
    """What a lane has of the contrast: sequences by side, text ids [B, I] and names."""

    sides: Sides[Sequences]
    text_ids: np.ndarray
    names: np.ndarray


class BatchBuilder:
    """Takes rows from the three streams and makes a lane's next joint batch."""

    def __init__(self, recipe: Recipe, corpus: Corpus, own_lanes: list[int], dense: bool = True) -> None:
        """`dense`: attention of these batches will run in dense groups."""
        self._recipe, self._corpus, self._dense = recipe, corpus, dense
        # Trained keys of several lanes are first encoded in a pass of their own.
        self._queries_alone = recipe.contrast.keys == "gradient" and len(own_lanes) > 1
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
        blocks, masked, names = [], {}, {}
        sizes = {
            "mmlm": (self._recipe.batch.mmlm_tokens, self._tokenizer.overhead(1)),
            "tlm": (self._recipe.batch.tlm_tokens, self._tokenizer.overhead(2)),
        }
        shift = 0
        for task, (tokens, overhead) in sizes.items():
            if task not in self.readers:
                continue
            rows = self.readers[task].take(lane, tokens=tokens, overhead=overhead)
            whole = assemble(rows.pool, Texts(rows.starts, rows.lengths), self._tokenizer)
            chosen = self._mask(whole.ids, self._generator(task, lane, step))
            masked[task] = Masked(chosen.ids, chosen.rows + shift, chosen.labels)
            blocks.append(Sequences(chosen.ids, whole.lengths))
            names[task] = self._names(rows)
            shift += len(whole.ids)
        pairs = self._pairs(lane, step)
        if "xlco" in self.readers:
            names["xlco"] = pairs.names
        return self._joint(
            Sequences.concatenate(blocks),
            pairs.sides,
            rows=np.concatenate([np.zeros(0, np.int64), *(m.rows for m in masked.values())]),
            labels=np.concatenate([np.zeros(0, np.int64), *(m.labels for m in masked.values())]),
            mmlm=len(masked["mmlm"].labels) if "mmlm" in masked else 0,
            text_ids=pairs.text_ids,
            names=names,
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
        piece, n_ids = self._tokenizer.special_ids["unk"], N_TEXTS[recipe.contrast.mixup]
        side = Sequences.filled(np.full(pairs, one if recipe.contrast.mixup == "off" else two), piece)
        return self._joint(
            Sequences.filled(np.array(trunk, np.int64), piece),
            Sides(side, side),
            rows=np.arange(sum(masked)) % max(1, sum(trunk)),
            labels=np.full(sum(masked), piece),
            mmlm=masked[0],
            text_ids=np.arange(pairs * n_ids).reshape(pairs, n_ids),
            names={},
        )

    def _joint(
        self,
        trunk: Sequences,
        pairs: Sides[Sequences],
        *,
        rows: np.ndarray,
        labels: np.ndarray,
        mmlm: int,
        text_ids: np.ndarray,
        names: dict[str, np.ndarray],
    ) -> JointBatch:
        """Sequences and masked rows as tensors, with their layouts."""
        contrast, none = self._recipe.contrast, Sequences.concatenate([])
        trained = contrast.keys == "gradient"
        queries = Sides(pairs.first, pairs.second if trained or contrast.symmetric else none)
        keys = Sides(pairs.first if contrast.symmetric else none, pairs.second)
        return JointBatch(
            tokens=self._flat([trunk, *queries]),
            trunk=make_layout(trunk.lengths, self._dense),
            queries=make_layout(Sequences.concatenate(queries).lengths, self._dense and self._queries_alone),
            sides=Sides(len(queries.first), len(queries.second)),
            keys=None if trained or not self._recipe.tasks["xlco"] else self._flat(keys),
            key_sides=Sides(0, 0) if trained else Sides(len(keys.first), len(keys.second)),
            rows=torch.from_numpy(rows),
            labels=torch.from_numpy(labels),
            mmlm=mmlm,
            text_ids=torch.from_numpy(text_ids),
            names=names,
        )

    def _flat(self, parts: list[Sequences] | Sides[Sequences]) -> FlatBatch:
        together = Sequences.concatenate(parts)
        return flat_batch(together.ids, together.lengths, self._dense)

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

    def _pairs(self, lane: int, step: int) -> _Pairs:
        contrast, pairs = self._recipe.contrast, self._recipe.batch.xlco_pairs
        if "xlco" not in self.readers:
            none = Sequences.concatenate([])
            return _Pairs(Sides(none, none), np.zeros((0, N_TEXTS[contrast.mixup]), np.int64), np.zeros((0, 1), str))
        mixing = contrast.mixup != "off"
        rows = self.readers["xlco"].take(lane, items=pairs * (2 if mixing else 1))
        text_ids, texts = rows.text_ids.T.astype(np.int64), Texts(rows.starts, rows.lengths)
        if mixing:
            sides = mix(texts, contrast.mixup == "paper", self._generator("mixup", lane, step))
        else:
            sides = (Texts(rows.starts[:1], rows.lengths[:1]), Texts(rows.starts[1:], rows.lengths[1:]))
        first, second = (assemble(rows.pool, side, self._tokenizer) for side in sides)
        return _Pairs(Sides(first, second), text_ids.reshape(pairs, -1), self._names(rows).reshape(pairs, -1))

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


def longest_sequence(recipe: Recipe, corpus: Corpus) -> int:
    """Tokens of the longest sequence a recipe can make of a corpus, special tokens included."""
    two = recipe.tasks["tlm"] or recipe.contrast.mixup != "off"
    return _longest(corpus, 2 if two else 1)


def _longest(corpus: Corpus, texts: Literal[1, 2]) -> int:
    return texts * corpus.manifest.max_tokens + corpus.manifest.tokenizer.overhead(texts)
