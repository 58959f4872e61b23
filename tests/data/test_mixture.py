"""Sources get the shares that the recipe asks for: measured on what readers take. Stages begin when they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.batch import BatchBuilder
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.files import File
from infoxlm_ds.data.manifest import Source
from infoxlm_ds.data.mixture import Mixture, by_size, capped, expected, mixture_of
from infoxlm_ds.data.order import SLOTS, Plan, SourceSize
from tests.corpus import small_recipe


def source(name: str, items: int, *languages: str) -> Source:
    file = File(name="x", bytes=0, sha256="0" * 64)
    figures: dict[str, Any] = {"items": items, "tokens": items * 20, "packs": -(-items // 512)}
    kind: Any = name.partition(".")[0]
    return Source(name=name, kind=kind, languages=languages, index=file, shards=(), **figures)


@pytest.fixture(scope="module")
def opened(corpus: Path) -> Corpus:
    """mono.de, mono.en, mono.hu, mono.ko, mono.ru, nway.rows: about 400 rows each."""
    return Corpus(corpus)


def recipe_of(opened: Corpus, folder: Path, *overrides: str) -> Recipe:
    return small_recipe(Path(opened.path), folder / "run", *("optimizer.steps=400", *overrides))


def of_mixture(opened: Corpus, mixture: Mixture, stage: int = 0) -> dict[str, float]:
    shares = mixture.stages[stage].shares / mixture.stages[stage].shares.sum()
    names = [opened.sources[number].name for number in mixture.numbers]
    return dict(zip(names, shares.tolist(), strict=True))


def test_sources_of_a_language_divide_its_share_by_their_rows() -> None:
    sources = [source("mono.a", 9000, "sw"), source("mono.b", 1000, "sw"), source("mono.c", 90_000, "en")]
    assert by_size(sources, 0.5, "language") == pytest.approx([90, 10, 300])
    assert by_size(sources, 0.5, "source") == pytest.approx([9000**0.5, 1000**0.5, 300])
    pairs = [source("para.a", 100, "en", "sw"), source("para.b", 300, "sw", "en"), source("nway.c", 100, "de", "en")]
    assert by_size(pairs, 0.5, "language") == pytest.approx([5, 15, 10])


def test_a_weight_is_a_share_of_the_items_that_are_read(opened: Corpus, tmp_path: Path) -> None:
    recipe = recipe_of(opened, tmp_path, "sampling.weights={mono.de: 3, 'mono.*': 1, mono.ko: 0}", "batch.lanes=1")
    mixture = mixture_of(recipe, opened, "mmlm")
    assert of_mixture(opened, mixture) == pytest.approx(
        {"mono.de": 1 / 2, "mono.en": 1 / 6, "mono.hu": 1 / 6, "mono.ru": 1 / 6}
    )
    assert of_mixture(opened, mixture_of(recipe, opened, "tlm")) == {"nway.rows": 1}  # no pattern names its source
    sources = [opened.sources[number] for number in mixture.numbers]
    plan = Plan([SourceSize(s.name, s.items, s.packs) for s in sources], mixture.stages, 1, "mmlm")
    draws = np.bincount([plan.draw(t).source for t in range(SLOTS)])
    rows = draws * np.array([s.items / s.packs for s in sources])
    assert dict(zip([s.name for s in sources], (rows / rows.sum()).tolist(), strict=True)) == pytest.approx(
        of_mixture(opened, mixture), abs=3 / SLOTS
    )


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("{mono.xx: 1}", "sampling.weights: no source of .* is mono.xx"),
        ("{mono.de: 1}", r"gives mono.en, mono.hu, mono.ko, mono.ru no share: add them, or 'mono.\*': 0"),
        ("{'mono.*': 0}", "leaves mmlm without a source"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(opened: Corpus, tmp_path: Path, weights: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        mixture_of(recipe_of(opened, tmp_path, f"sampling.weights={weights}"), opened, "mmlm")


def test_a_stream_without_a_source_is_refused(opened: Corpus, tmp_path: Path) -> None:
    only = Corpus(opened.path)
    only.sources = tuple(s for s in only.sources if s.kind == "mono")
    with pytest.raises(UserError, match="no source for xlco, which reads para or nway"):
        mixture_of(recipe_of(opened, tmp_path), only, "xlco")


@given(
    wanted=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    most=st.lists(st.floats(0.1, 50), min_size=6, max_size=6),
    stages=st.integers(1, 3),
    fill=st.floats(0.05, 0.99),
)
@settings(max_examples=100, deadline=None)
def test_the_cap_holds_and_the_others_keep_their_proportions(
    opened: Corpus, wanted: list[float], most: list[float], stages: int, fill: float
) -> None:
    n = len(wanted)
    table = np.array([np.roll(wanted, turn) for turn in range(stages)])
    cap = np.array(most[:n])
    budgets = np.full(stages, fill * cap.sum() / stages)
    recipe: Any = None  # only a message reads it
    parts = capped(table, budgets, cap, recipe, "mmlm")
    assert parts.sum(1) == pytest.approx(np.ones(stages))
    totals = budgets @ parts
    assert (totals <= cap * (1 + 1e-6)).all()
    free = totals < cap * (1 - 1e-6)
    ratio = parts[:, free] / table[:, free]
    assert ratio == pytest.approx(np.broadcast_to(ratio[:, :1], ratio.shape))


def test_no_source_is_read_more_often_than_most_epochs(opened: Corpus, tmp_path: Path) -> None:
    keys = ("sampling.weights={mono.de: 10, 'mono.*': 1}", "batch.mmlm_tokens=600", "optimizer.steps=40000")
    plain = expected(recipe_of(opened, tmp_path, *keys), opened, "mmlm")
    assert plain[0].source.name == "mono.de" and plain[0].passes > 4000
    recipe = recipe_of(opened, tmp_path, *keys, "sampling.most_epochs=1400")
    capped = expected(recipe, opened, "mmlm")
    assert capped[0].passes == pytest.approx(1400) and max(one.passes for one in capped) < 1400.001
    sources = [one.source for one in capped]
    plan = Plan(
        [SourceSize(s.name, s.items, s.packs) for s in sources], mixture_of(recipe, opened, "mmlm").stages, 1, ""
    )
    whole = round(sum(one.passes * one.source.packs for one in capped))
    draws = np.bincount([plan.draw(t).source for t in range(whole)])
    assert draws / [s.packs for s in sources] == pytest.approx([one.passes for one in capped], rel=0.06)


def test_a_cap_that_leaves_steps_without_text_is_refused(opened: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"most_epochs 1: 400 steps of mmlm need [\d.]+ passes over its sources"):
        mixture_of(recipe_of(opened, tmp_path, "sampling.most_epochs=1", "batch.mmlm_tokens=2000"), opened, "mmlm")


@pytest.mark.parametrize("task", ["mmlm", "tlm", "xlco"])
def test_a_stage_begins_about_the_step_asked_for(opened: Corpus, tmp_path: Path, task: str) -> None:
    sizes = ("batch.mmlm_tokens=900", "batch.tlm_tokens=900", "batch.xlco_pairs=30", "batch.lanes=2")
    weights = ("sampling.weights={mono.ko: 0, '*': 1}", "{mono.ko: 1, nway.rows: 1, '*': 0}")
    recipe = recipe_of(
        opened, tmp_path, *sizes, weights[0], f"sampling.stages=[{{from_step: 200, weights: {weights[1]}}}]"
    )
    first_draw = mixture_of(recipe, opened, task).stages[1].first_draw
    builder = BatchBuilder(recipe, opened, [0, 1])
    stream, korean = builder.readers[task], [s.name for s in opened.sources].index("mono.ko")
    overhead = opened.manifest.tokenizer.overhead(1 if task == "mmlm" else 2)
    how: dict[str, int] = {"items": 30} if task == "xlco" else {"tokens": 900, "overhead": overhead}
    draws, shares = [], []
    for _ in range(400):
        taken = np.concatenate([stream.take(lane, **how).where[0] for lane in (0, 1)])
        shares.append((taken == korean).mean())
        draws.append(stream.state()[0][0])  # the lanes share windows of one pack
    assert np.searchsorted(draws, first_draw) == pytest.approx(200, rel=0.1)
    if task == "mmlm":
        assert max(shares[:180]) == 0 and min(shares[230:]) == 1


def test_masks_follow_their_stages(opened: Corpus, tmp_path: Path) -> None:
    recipe = recipe_of(
        opened, tmp_path, "masking.stages=[{from_step: 3, probability: 0.5}, {from_step: 5, probability: 1}]"
    )
    assert [recipe.masking.probability_at(step) for step in range(7)] == [0.15] * 3 + [0.5] * 2 + [1.0] * 2
    assert recipe.masking.highest == 1
    builder = BatchBuilder(recipe, opened, [0, 1, 2, 3])
    shares = []
    for step in range(7):
        lanes = [builder.build(lane, step) for lane in range(4)]
        shares.append(sum(len(lane.labels) for lane in lanes) / sum(lane.trunk.tokens for lane in lanes))
    assert max(shares[:3]) < 0.3 < min(shares[3:5]) and max(shares[3:5]) < 0.6 < min(shares[5:])
    assert len(builder.longest().labels) >= max(len(lane.labels) for lane in lanes)
