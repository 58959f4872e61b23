"""Which sources a stream reads, and in which shares: by size and alpha or by weights, under a cap, in stages.

A stage begins at a step, but the order of items is a function of the draw's number. So a step is turned into the draw
that a run reaches about then, by the mean length of the items. The same recipe and corpus always give the same draw.

A *row* is an item as it is stored. What a step takes, tokens or pairs, is its *budget*, and a row's part is its *cost*.

Legend: n sources that the stream reads, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from infoxlm_ds.config import Recipe, Sampling, UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.manifest import Source
from infoxlm_ds.data.order import Stage

# The kinds of sources that each stream reads.
KINDS = {"mmlm": ("mono",), "tlm": ("para", "nway"), "xlco": ("para", "nway")}


@dataclass(frozen=True)
class Mixture:
    """`numbers`: of the sources in the corpus. `stages`: the shares of these sources' rows."""

    numbers: tuple[int, ...]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Expected:
    """What a run is expected to read of a source: rows, also as a share of the stream's, and passes over the source."""

    source: Source
    rows: float
    share: float
    passes: float


def mixture_of(recipe: Recipe, corpus: Corpus, stream: str) -> Mixture:
    """The sources and shares of a stream. UserError if there are none, or if they cannot have what is asked for."""
    numbers = [i for i, source in enumerate(corpus.sources) if source.kind in KINDS[stream] and source.items]
    sources = [corpus.sources[i] for i in numbers]
    if not sources:
        raise UserError(f"{corpus.path} has no source for {stream}, which reads {' or '.join(KINDS[stream])} sources")
    shares = _shares(recipe.sampling, corpus, sources, stream)  # [S, n]
    kept = np.flatnonzero(shares.any(0))
    numbers, shares = [numbers[i] for i in kept], shares[:, kept]
    if not recipe.sampling.depends_on_steps:
        return Mixture(tuple(numbers), (Stage(0, shares[0]),))
    costs, steps, budget = _costs(recipe, corpus, numbers, stream), _steps(recipe), _budget(recipe, stream)
    if recipe.sampling.most_epochs is not None:
        most = recipe.sampling.most_epochs * np.array([corpus.sources[i].items for i in numbers]) * costs
        shares = capped(shares * costs, steps * budget, most, recipe, stream) / costs
    return Mixture(tuple(numbers), _stages([corpus.sources[i] for i in numbers], shares, costs, steps * budget))


def expected(recipe: Recipe, corpus: Corpus, stream: str) -> list[Expected]:
    """What the run will read of each of the stream's sources, on average."""
    mixture = mixture_of(recipe, corpus, stream)
    costs = _costs(recipe, corpus, mixture.numbers, stream)
    shares = np.array([stage.shares for stage in mixture.stages]) * costs
    budgets = _steps(recipe) * _budget(recipe, stream)
    rows = budgets @ (shares / shares.sum(1, keepdims=True)) / costs
    sources = [corpus.sources[i] for i in mixture.numbers]
    return [
        Expected(s, float(n), float(n / rows.sum()), float(n / s.items)) for s, n in zip(sources, rows, strict=True)
    ]


def _shares(sampling: Sampling, corpus: Corpus, sources: list[Source], stream: str) -> np.ndarray:
    """Relative shares of the rows of the sources, [S, n], before the cap."""
    found = []
    for number, (alpha, weights) in enumerate(sampling.settings):
        where = f"sampling.stages.{number - 1}.weights" if number else "sampling.weights"
        for pattern in weights:
            if not any(fnmatchcase(source.name, pattern) for source in corpus.sources):
                raise UserError(f"{where}: no source of {corpus.path} is {pattern}: correct its spelling")
        of_stage = _by_weights(weights, sources, stream, where)
        found.append(by_size(sources, alpha, sampling.by) if of_stage is None else of_stage)
    return np.array(found)


def by_size(sources: list[Source], alpha: float, by: str) -> np.ndarray:
    """In proportion to p^alpha (XLM-R, section 3.1). p is a source's part of all rows, or that of all sources in the
    same languages, which then divide their share by their rows."""
    groups = [source.name if by == "source" else " ".join(sorted(source.languages)) for source in sources]
    rows = np.array([source.items for source in sources], dtype=np.float64)
    of_group = np.array([rows[[other == group for other in groups]].sum() for group in groups])
    return of_group**alpha * (rows / of_group)


def _by_weights(weights: dict[str, float], sources: list[Source], stream: str, where: str) -> np.ndarray | None:
    """The weight of each source: of its name, else of the longest pattern that fits. None if no source has one."""
    patterns = [[p for p in weights if p == s.name or fnmatchcase(s.name, p)] for s in sources]
    if not any(patterns):
        return None
    if missing := [source.name for source, fitting in zip(sources, patterns, strict=True) if not fitting]:
        rest = f"'{missing[0].partition('.')[0]}.*'"
        raise UserError(f"{where} gives {', '.join(missing)} no share: add them, or {rest}: 0 to leave them out")
    found = [
        weights[s.name if s.name in fitting else max(fitting, key=lambda p: (len(p), p))]
        for s, fitting in zip(sources, patterns, strict=True)
    ]
    if not any(found):
        names = ", ".join(source.name for source in sources)
        raise UserError(
            f"{where} leaves {stream} without a source: give one of {names} more than 0, or set weights.{stream} to 0 "
            "to leave out the task"
        )
    return np.array(found)


def _steps(recipe: Recipe) -> np.ndarray:
    """How many steps each stage of the sampling has, [S]."""
    return np.diff([0, *(stage.from_step for stage in recipe.sampling.stages), recipe.optimizer.steps])


def _budget(recipe: Recipe, stream: str) -> int:
    """What a step takes: tokens, or pairs."""
    batch, mixing = recipe.batch, recipe.contrast.mixup != "off"
    of_lane = batch.xlco_pairs * (2 if mixing else 1) if stream == "xlco" else getattr(batch, f"{stream}_tokens")
    return batch.lanes * of_lane


def _costs(recipe: Recipe, corpus: Corpus, numbers: Sequence[int], stream: str) -> np.ndarray:
    """The part of a step's budget that a row of each source takes on average, [n]."""
    sources = [corpus.sources[i] for i in numbers]
    if stream == "xlco":
        return np.array([recipe.contrast.pairs_per_row if s.kind == "nway" else 1 for s in sources], np.float64)
    overhead = corpus.manifest.tokenizer.overhead(1 if stream == "mmlm" else 2)
    tokens = [
        _pair_tokens(corpus, number) if source.kind == "nway" else source.tokens / source.items
        for number, source in zip(numbers, sources, strict=True)
    ]
    return np.array(tokens) + overhead


def _pair_tokens(corpus: Corpus, number: int) -> float:
    """The mean length of the pairs that n-way rows give, by the source's first pack: rows are shuffled."""
    lengths = corpus.pack(number, 0).lengths
    return float(np.mean(2 * lengths.sum(0) / (lengths > 0).sum(0)))


def capped(wanted: np.ndarray, budgets: np.ndarray, most: np.ndarray, recipe: Recipe, stream: str) -> np.ndarray:
    """The parts of the budgets [S] that the sources get, [S, n], if none gets more than `most` [n] in all and the
    others divide what it leaves in each stage. `wanted` [S, n]: relative parts without the cap."""
    parts = wanted / wanted.sum(1, keepdims=True)
    at_cap = np.zeros(len(most), bool)
    while (over := ~at_cap & (budgets @ parts > most * (1 + 1e-9))).any():
        parts[:, over] *= most[over] / (budgets @ parts)[over]
        at_cap |= over
        left, others = 1 - parts[:, at_cap].sum(1), np.where(at_cap, 0, wanted)
        if (others.sum(1) <= 0).any():
            cap, steps = recipe.sampling.most_epochs, recipe.optimizer.steps
            raise UserError(
                f"sampling.most_epochs {cap:g}: {steps} steps of {stream} need {cap * budgets.sum() / most.sum():.3g} "
                "passes over its sources on average, and a stage has none left below the cap: raise it, add text, or "
                "train for fewer steps"
            )
        free = others / others.sum(1, keepdims=True) * left[:, None]
        parts = np.where(at_cap, parts, free)
    return parts


def _stages(sources: list[Source], shares: np.ndarray, costs: np.ndarray, budgets: np.ndarray) -> tuple[Stage, ...]:
    """Stages with the draws at which they begin. A draw is a pack."""
    packs = np.array([source.packs / source.items for source in sources])  # of a row
    draws = budgets * (shares @ packs) / (shares @ costs)
    firsts = np.round(np.cumsum(draws) - draws).astype(np.int64)
    return tuple(Stage(int(first), of_stage) for first, of_stage in zip(firsts, shares, strict=True))
