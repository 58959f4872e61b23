"""`infoxlm prep mix`: prints what a run is expected to read of each source and language, for each stream."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from infoxlm_ds.config import Recipe, Sampling
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.mixture import Expected, expected
from infoxlm_ds.reading import load_recipe

OFTEN = 10  # passes: more are said in a line


def print_mixture(path: Path, overrides: list[str], console: Console) -> None:
    """Print a table of sources and one of languages for each task. UserError if the recipe or its corpus is wrong, or
    if its sampling cannot be had."""
    recipe = load_recipe(path, overrides)
    corpus = Corpus(recipe.corpus)
    for task in recipe.used_tasks:
        sources = expected(recipe, corpus, task)
        console.print(_by_source(task, recipe.optimizer.steps, sources))
        console.print(_by_language(task, language_shares(corpus, sources, recipe.sampling)))
        for one in sources:
            if one.passes > OFTEN:
                often = f"{one.source.name}: {task} passes {one.passes:.1f} times over it"
                console.print(
                    f"{often}; sampling.most_epochs gives a part of its share to others",
                    soft_wrap=True,
                    highlight=False,
                )


def planned_shares(recipe: Recipe, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Each language's expected share of the texts, by task."""
    return {
        task: language_shares(corpus, expected(recipe, corpus, task), recipe.sampling) for task in recipe.used_tasks
    }


def language_shares(corpus: Corpus, sources: list[Expected], sampling: Sampling) -> dict[str, float]:
    """Each language's share of the texts that a stream reads, in falling order. That of n-way rows is counted in the
    first pack of the source."""
    shares: defaultdict[str, float] = defaultdict(float)
    for one in sources:
        sides = np.full(len(one.source.languages), 1 / len(one.source.languages))
        if one.source.kind == "nway":
            number = next(i for i, source in enumerate(corpus.sources) if source.name == one.source.name)
            present = corpus.pack(number, 0).lengths > 0
            languages = one.source.languages
            pivot = languages.index(sampling.pivot) if sampling.pivot in languages else None
            sides = _sides(present, pivot, sampling.pivot_share)
        for language, side in zip(one.source.languages, sides.tolist(), strict=True):
            shares[language] += one.share * side
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _sides(present: np.ndarray, pivot: int | None, share: float) -> np.ndarray:
    """The share of the sides of pairs that each language has, [s], if rows have the languages `present` [s, n]: the
    first side is any, and the second is another or, in the pivot's share, the pivot."""
    k = present.sum(0)
    first = present / k
    second = first.copy()
    if pivot is not None:
        moved = share * present[pivot] * (k - 2) / k  # to the pivot, from the others
        second -= present * moved / (k - 1)
        second[pivot] = first[pivot] + moved
    return np.asarray((first + second).mean(1) / 2)


def _by_source(task: str, steps: int, sources: list[Expected]) -> Table:
    table = Table("source", "languages", title=f"{task}: {steps:,} steps")
    for heading in ("share of items", "items read", "passes"):
        table.add_column(heading, justify="right")
    for one in sources:
        languages = " ".join(one.source.languages)
        table.add_row(one.source.name, languages, f"{one.share:.2%}", f"{one.rows:,.0f}", f"{one.passes:.2f}")
    return table


def _by_language(task: str, shares: dict[str, float]) -> Table:
    table = Table("language", title=f"{task}: languages")
    table.add_column("share of texts", justify="right")
    for language, share in shares.items():
        table.add_row(language, f"{share:.2%}")
    return table
