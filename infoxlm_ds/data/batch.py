"""The joint batch: one flat batch of token sequences for all three losses, and all other tensors that
a lane's pass reads.

A lane is one micro-batch of a step. Its contents do not depend on the rank that runs it.

Legend: T tokens, S sequences, M masked rows, B pairs and H hard negatives of this lane, I text ids of an item.

Order of the sequences: MMLM blocks, TLM pairs, XlCo queries. The queries leave the encoder at the universal layer, the
inner layer whose output the contrast reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from infoxlm_ds.config import Contrast, Recipe, UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.flat_batch import FlatBatch, Layout, flat_batch, make_layout
from infoxlm_ds.data.items import ALONE, Grouping, Rows
from infoxlm_ds.data.masking import Masked, mask_pieces
from infoxlm_ds.data.mixture import mixture_of
from infoxlm_ds.data.order import keyed_generator
from infoxlm_ds.data.sequences import Sequences, Texts, assemble, mix
from infoxlm_ds.data.stream import StreamReader
from infoxlm_ds.data.upload import ON_HOST, to_device

# Text ids of an item, by mixup. A pair has one for each side and one that all translations of its row share.
N_TEXTS = {"off": 3, "paper": 6, "reference": 6}
X = TypeVar("X")


class Sides(NamedTuple, Generic[X]):
    """A value for the first sides of pairs, one for their second sides, and one for their hard negatives."""

    first: X
    second: X
    hard: X


def split_sides(rows: Tensor, counts: Sides[int]) -> Sides[Tensor]:
    """Split rows into those of first sides, of second sides and of hard negatives, which stand in this order."""
    return Sides(*rows.split(list(counts)))


@dataclass(frozen=True)
class JointBatch:
    """One lane's micro-batch, ready for its pass.

    `tokens`: the sequences of MMLM and TLM, called the trunk, then XlCo's queries. `trunk`, `queries`: the layout of
    each of these two parts alone. `rows`, `labels` [M] int64: masked tokens; the first `mmlm` of them are MMLM's.
    `sides`: how many queries are first sides, second sides and hard negatives. `keys`, `key_sides`: the same for the
    input of the key encoder; `keys` is None if keys have a gradient. A number of sides is B (of negatives H), or 0 if
    the side takes no part. `text_ids` [B, I], `hard_ids` [H, I] int64: stay on the host. `names`: by task, each item's
    language or pair of languages; XlCo's are [B, 1], or [B, 2] for mixed pairs. `text_tokens`: of all texts, with
    special tokens. Each side of a pair counts once, whichever encoder reads it.
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
    text_ids: Tensor = field(metadata=ON_HOST)
    hard_ids: Tensor = field(metadata=ON_HOST)
    names: dict[str, np.ndarray]
    text_tokens: int

    @property
    def counts(self) -> dict[str, int]:
        """The number of items in each task's mean: masked pieces, masked pieces, pairs."""
        return {"mmlm": self.mmlm, "tlm": len(self.labels) - self.mmlm, "xlco": len(self.text_ids)}

    @property
    def masked_parts(self) -> dict[str, slice]:
        """Which of the masked tokens are MMLM's, and which TLM's."""
        return {"mmlm": slice(None, self.mmlm), "tlm": slice(self.mmlm, None)}

    @property
    def masked_sequences(self) -> Tensor:
        """The sequence of each masked token, [M] int64: MMLM's blocks come first, then TLM's pairs."""
        return self.tokens.layout.sequence[self.rows]

    @property
    def queries_alone(self) -> FlatBatch:
        """The queries as a batch of their own. Their layout has dense groups only if they get a pass of their own."""
        return FlatBatch(self.tokens.ids[self.trunk.tokens :], self.queries)

    def to(self, device: torch.device) -> JointBatch:
        """The same batch on a device, by one upload."""
        return to_device(self, device)


class _Pairs(NamedTuple):
    """A lane's part of the contrast: sequences by side, text ids [B, I] and [H, I], and names."""

    sides: Sides[Sequences]
    text_ids: np.ndarray
    hard_ids: np.ndarray
    names: np.ndarray


class BatchBuilder:
    """Takes rows from the three streams and makes the next joint batch of a lane."""

    def __init__(self, recipe: Recipe, corpus: Corpus, own_lanes: list[int], dense: bool = True) -> None:
        """`dense`: attention on these batches will run in dense groups."""
        self._recipe, self._corpus, self._dense = recipe, corpus, dense
        # With trained keys and several lanes on a rank, queries are first encoded in a pass of their own.
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
                mixture=mixture_of(recipe, corpus, task),
                lanes=recipe.batch.lanes,
                window_packs=sampling.window_packs,
                own_lanes=own_lanes,
                pivot=sampling.pivot,
                pivot_share=sampling.pivot_share,
                grouping=_grouping(recipe.contrast) if task == "xlco" else ALONE,
                negatives=recipe.contrast.hard_negatives if task == "xlco" else 0,
            )
            for task in recipe.used_tasks
        }
        self._check_size()
        if recipe.contrast.hard_negatives and "xlco" in self.readers and not corpus.manifest.counts.get("negatives"):
            raise UserError(
                f"contrast.hard_negatives {recipe.contrast.hard_negatives}: no row of {corpus.path} has negatives: set "
                "it to 0, or prepare rows that have some (docs/data.md)"
            )

    def build(self, lane: int, step: int) -> JointBatch:
        """The micro-batch of `lane` at `step`. Masks and mixup are keyed by both."""
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
            chosen = self._mask(whole.ids, step, self._generator(task, lane, step))
            masked[task] = Masked(chosen.ids, chosen.rows + shift, chosen.labels)
            blocks.append(Sequences(chosen.ids, whole.lengths))
            names[task] = self._names(rows)
            shift += len(whole.ids)
        pairs = self._pairs(lane, step)
        if "xlco" in self.readers:
            names["xlco"] = pairs.names
        return self._joint(
            Sequences.concatenate(blocks),
            pairs,
            rows=np.concatenate([np.zeros(0, np.int64), *(m.rows for m in masked.values())]),
            labels=np.concatenate([np.zeros(0, np.int64), *(m.labels for m in masked.values())]),
            mmlm=len(masked["mmlm"].labels) if "mmlm" in masked else 0,
            names=names,
        )

    def longest(self) -> JointBatch:
        """A micro-batch that takes as much memory as any that the recipe can make: full token budgets, pairs of the
        longest texts, and as many masked pieces as chance ever gives. Its contents mean nothing."""
        single, double = _longest(self._corpus, 1), _longest(self._corpus, 2)
        recipe = self._recipe
        batch, tasks, probability = recipe.batch, recipe.tasks, recipe.masking.highest
        trunk, masked = [], []
        for task, budget, longest in (("mmlm", batch.mmlm_tokens, single), ("tlm", batch.tlm_tokens, double)):
            filled = max(budget, longest) if tasks[task] else 0
            trunk += [longest] * (filled // longest) + [filled % longest] * (filled % longest > 0)
            often = probability * filled + 5 * (probability * filled) ** 0.5  # five standard deviations
            masked.append(min(filled, int(often)))
        pairs = batch.xlco_pairs if tasks["xlco"] else 0
        piece, n_ids = self._tokenizer.special_ids["unk"], N_TEXTS[recipe.contrast.mixup]
        side = Sequences.filled(np.full(pairs, single if recipe.contrast.mixup == "off" else double), piece)
        negatives = pairs * recipe.contrast.hard_negatives
        hard = Sequences.filled(np.full(negatives, single), piece)
        text_ids = np.arange((pairs + negatives) * n_ids).reshape(-1, n_ids)
        names = np.zeros((pairs, 1), str)
        return self._joint(
            Sequences.filled(np.array(trunk, np.int64), piece),
            _Pairs(Sides(side, side, hard), text_ids[:pairs], text_ids[pairs:], names),
            rows=np.arange(sum(masked)) % max(1, sum(trunk)),
            labels=np.full(sum(masked), piece),
            mmlm=masked[0],
            names={"xlco": names},
        )

    def _joint(
        self,
        trunk: Sequences,
        pairs: _Pairs,
        *,
        rows: np.ndarray,
        labels: np.ndarray,
        mmlm: int,
        names: dict[str, np.ndarray],
    ) -> JointBatch:
        """Make the tensors and layouts of sequences and masked rows."""
        contrast, none = self._recipe.contrast, Sequences.concatenate([])
        first, second, hard = pairs.sides
        trained = contrast.keys == "gradient"
        queries = Sides(first, second if trained or contrast.symmetric else none, hard if trained else none)
        keys = Sides(first if contrast.symmetric else none, second, hard)
        return JointBatch(
            tokens=self._flat([trunk, *queries]),
            trunk=make_layout(trunk.lengths, self._dense),
            queries=make_layout(np.concatenate([s.lengths for s in queries]), self._dense and self._queries_alone),
            sides=Sides(*map(len, queries)),
            keys=None if trained or not self._recipe.tasks["xlco"] else self._flat(keys),
            key_sides=Sides(0, 0, 0) if trained else Sides(*map(len, keys)),
            rows=torch.from_numpy(rows),
            labels=torch.from_numpy(labels),
            mmlm=mmlm,
            text_ids=torch.from_numpy(pairs.text_ids),
            hard_ids=torch.from_numpy(pairs.hard_ids),
            names=names,
            text_tokens=sum(len(part.ids) for part in (trunk, *pairs.sides)),
        )

    def _flat(self, parts: list[Sequences] | Sides[Sequences]) -> FlatBatch:
        together = Sequences.concatenate(parts)
        return flat_batch(together.ids, together.lengths, self._dense)

    def _check_size(self) -> None:
        """UserError if one step would read the corpus more than once."""
        batch, twice = self._recipe.batch, 1 if self._recipe.contrast.mixup == "off" else 2
        for task, reader in self.readers.items():
            name, has = ("xlco_pairs", reader.items) if task == "xlco" else (f"{task}_tokens", reader.tokens)
            needs = getattr(batch, name) * batch.lanes * (twice if task == "xlco" else 1)
            if needs > has:
                raise UserError(
                    f"a step of batch.{name} {getattr(batch, name)} on {batch.lanes} lanes reads {needs}, but the "
                    f"corpus {self._corpus.path} has {has}: set a smaller batch.{name} or add text"
                )

    def _pairs(self, lane: int, step: int) -> _Pairs:
        contrast, pairs = self._recipe.contrast, self._recipe.batch.xlco_pairs
        if "xlco" not in self.readers:
            none, no_ids = Sequences.concatenate([]), np.zeros((0, N_TEXTS[contrast.mixup]), np.int64)
            return _Pairs(Sides(none, none, none), no_ids, no_ids, np.zeros((0, 1), str))
        mixing = contrast.mixup != "off"
        rows = self.readers["xlco"].take(lane, items=pairs * (2 if mixing else 1))
        text_ids = rows.text_ids.T.astype(np.int64)
        there = rows.lengths[2:].T > 0
        hard = Texts(rows.starts[2:].T[there][None], rows.lengths[2:].T[there][None])
        if mixing:
            texts = Texts(rows.starts[:2], rows.lengths[:2])
            sides = mix(texts, contrast.mixup == "paper", self._generator("mixup", lane, step))
        else:
            sides = (Texts(rows.starts[:1], rows.lengths[:1]), Texts(rows.starts[1:2], rows.lengths[1:2]))
        return _Pairs(
            Sides(*(assemble(rows.pool, side, self._tokenizer) for side in (*sides, hard))),
            text_ids[:, :3].reshape(pairs, -1),
            np.repeat(text_ids[:, 3:][there][:, None], N_TEXTS[contrast.mixup], axis=1),
            self._names(rows).reshape(pairs, -1),
        )

    def _mask(self, ids: np.ndarray, step: int, generator: np.random.Generator) -> Masked:
        mask_id = self._tokenizer.special_ids["mask"]
        return mask_pieces(ids, self._regular, mask_id, self._recipe.masking, step, generator)

    def _generator(self, use: str, lane: int, step: int) -> np.random.Generator:
        return keyed_generator(self._recipe.seed, use, lane, step)

    def _names(self, rows: Rows) -> np.ndarray:
        """Each item's language or pair of languages. Both directions of a pair have the same name."""
        names = np.array(self._corpus.languages)[np.sort(rows.languages, axis=0)]
        return names[0] if len(names) == 1 else names[0] + np.array("-") + names[1]


def _grouping(contrast: Contrast) -> Grouping:
    return Grouping(contrast.pairs_per_row, neighbours=contrast.mixup == "reference")


def longest_sequence(recipe: Recipe, corpus: Corpus) -> int:
    """Tokens of the longest sequence that a recipe can make of a corpus, special tokens included."""
    two = recipe.tasks["tlm"] or recipe.contrast.mixup != "off"
    return _longest(corpus, 2 if two else 1)


def _longest(corpus: Corpus, texts: Literal[1, 2]) -> int:
    return texts * corpus.manifest.max_tokens + corpus.manifest.tokenizer.overhead(texts)
