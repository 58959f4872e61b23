"""The reader follows the plan, item by item. In the test's corpus, every id shows the place of its item.

Side s of row r of source number n holds the id `ID + (n * 10_000 + r) * 8 + s`, repeated. Its text id
is the same number.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.files import File
from infoxlm_ds.data.items import Grouping, Rows
from infoxlm_ds.data.manifest import NAME, Manifest, Shard, Source, Tokenizer
from infoxlm_ds.data.mixture import KINDS, Mixture
from infoxlm_ds.data.order import Stage
from infoxlm_ds.data.packs import ROWS, Pack, write_shard
from infoxlm_ds.data.stream import ROUNDS, StreamReader

ID = 1000
SOURCES: dict[str, tuple[Literal["mono", "para", "nway"], tuple[str, ...], int]] = {
    "mono.de": ("mono", ("de",), 1100),
    "mono.sw": ("mono", ("sw",), 40),
    "nway.talks": ("nway", ("ar", "de", "en", "sw"), 1300),
    "para.en-fi": ("para", ("en", "fi"), 600),
}
MONO, PAIRS = [0, 1], [2, 3]


def lengths_of(number: int, sides: int, rows: int) -> np.ndarray:
    """[sides, rows]. If a source has more than two sides, about a third of them is missing, but each row has two."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, 13, (sides, rows))
    missing = rng.random((sides, rows)) < (0.35 if sides > 2 else 0)
    keep = np.argsort(rng.random((sides, rows)), axis=0)[:2]
    missing[keep, np.arange(rows)] = False
    return np.where(missing, 0, lengths)


def packs_of(number: int, sides: int, rows: int) -> Iterator[Pack]:
    lengths = lengths_of(number, sides, rows)
    names = ID + (number * 10_000 + np.arange(rows)) * 8 + np.arange(sides)[:, None]
    for start in range(0, rows, ROWS):
        of_pack = (slice(None), slice(start, start + ROWS))
        ids = np.repeat(names[of_pack].T.ravel(), lengths[of_pack].T.ravel())
        yield Pack(ids.astype(np.uint32), lengths[of_pack].astype(np.uint16), names[of_pack].astype(np.uint64))


def write(folder: Path, names: list[str]) -> Path:
    """A corpus of these sources."""
    sources = []
    for number, (name, (kind, languages, rows)) in enumerate(SOURCES.items()):
        if name in names:
            shard = folder / name / f"{name}-00000.tar"
            shard.parent.mkdir(parents=True)
            index = np.insert(write_shard(shard, packs_of(number, len(languages), rows), shard.stem), 0, 0, axis=1)
            np.save(folder / name / "index.npy", index)
            size = shard.stat().st_size
            tar = Shard(name=f"{name}/{shard.name}", bytes=size, sha256="", packs=len(index))
            npy = (folder / name / "index.npy").read_bytes()
            of_index = File(name=f"{name}/index.npy", bytes=len(npy), sha256=hashlib.sha256(npy).hexdigest())
            tokens = int(lengths_of(number, len(languages), rows).sum())
            figures: dict[str, Any] = {"items": rows, "tokens": tokens, "packs": len(index)}
            sources.append(Source(name=name, kind=kind, languages=languages, index=of_index, shards=(tar,), **figures))
    tokenizer = Tokenizer(name="none", vocab_size=10**6, special_ids={}, files=())
    manifest = Manifest(name="marked", max_tokens=12, tokenizer=tokenizer, sources=tuple(sources), counts={}, prep={})
    (folder / NAME).write_text(manifest.render(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(write(tmp_path_factory.mktemp("marked"), list(SOURCES)))


def reader(corpus: Corpus, stream: str, lanes: int = 1, own: list[int] | None = None, **how: Any) -> StreamReader:
    settled: dict[str, Any] = {"seed": 1, "window_packs": 2} | how
    settled |= {"mixture": mixture(corpus, stream, settled.pop("alpha", 0.7), settled.pop("later", {}))}
    return StreamReader(corpus, stream, lanes=lanes, own_lanes=own or list(range(lanes)), **settled)


def mixture(corpus: Corpus, stream: str, alpha: float, later: dict[int, float]) -> Mixture:
    """Of all sources of the stream, by their size; `later`: other alphas from these draws on."""
    numbers = tuple(i for i, source in enumerate(corpus.sources) if source.kind in KINDS[stream])
    items = np.array([corpus.sources[i].items for i in numbers], np.float64)
    return Mixture(numbers, tuple(Stage(first, items**of_stage) for first, of_stage in ({0: alpha} | later).items()))


def lanes_share_below(rounds: int) -> AbstractContextManager[Any]:
    """Lanes share windows if a corpus has fewer rounds of them; 0: never."""
    return patch("infoxlm_ds.data.stream.ROUNDS", rounds)


def content(rows: Rows) -> list[tuple[Any, ...]]:
    """Each item's ids, text ids, languages and place: everything that a batch can depend on."""
    starts, lengths = rows.starts, rows.lengths
    return [
        (
            *(rows.pool[starts[s, i] : starts[s, i] + lengths[s, i]].tobytes() for s in range(len(starts))),
            *rows.text_ids[:, i].tolist(),
            *rows.languages[:, i].tolist(),
            *rows.where[:, i].tolist(),
        )
        for i in range(len(rows))
    ]


def whole_windows(corpus: Corpus, stream: str, lanes: int, windows: int, **how: Any) -> np.ndarray:
    """`where` [3, n] of all items of the first windows."""
    stream_reader = reader(corpus, stream, lanes, **how)
    found = []
    if stream_reader.shared:
        while stream_reader.state()[0][0] < windows:
            found += [stream_reader.take(lane, items=1).where for lane in range(lanes)]
        left = stream_reader.state()[0][1]
        return np.concatenate(found, axis=1)[:, : -left or None]
    for lane in range(lanes):
        while stream_reader.state()[lane][0] < windows:
            found.append(stream_reader.take(lane, items=1).where)
    return np.concatenate(found, axis=1)


@given(
    stream=st.sampled_from(["mmlm", "xlco"]),
    lanes=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
    packs=st.integers(1, 3),
    rounds=st.sampled_from([0, ROUNDS]),
)
@settings(max_examples=12, deadline=None)
def test_every_item_comes_once_a_source_epoch(
    marked: Corpus, stream: str, lanes: int, seed: int, packs: int, rounds: int
) -> None:
    with lanes_share_below(rounds):
        where = whole_windows(marked, stream, lanes, 4, seed=seed, window_packs=packs, alpha=0.5)
    for number in MONO if stream == "mmlm" else PAIRS:
        rows = SOURCES[marked.sources[number].name][2]
        of_source = where[1:, where[0] == number]
        assert len(np.unique(of_source, axis=1).T) == of_source.shape[1]
        for epoch in range(int(of_source[0].max(initial=-1))):
            assert sorted(of_source[1, of_source[0] == epoch]) == list(range(rows))


@pytest.mark.parametrize(("lanes", "packs"), [(4, 2), (2, 4), (8, 16)])
def test_passes_over_a_small_corpus_do_not_overlap_by_more_than_a_window(
    tmp_path: Path, lanes: int, packs: int
) -> None:
    """Three packs: lanes with windows of their own were 13 passes apart after 500."""
    small = Corpus(write(tmp_path, ["mono.de"]))
    rows, stream = SOURCES["mono.de"][2], reader(small, "mmlm", lanes, window_packs=packs)
    left: Counter[int] = Counter()
    for _ in range(1500):
        begun = [int(epoch) for lane in range(lanes) for epoch in stream.take(lane, tokens=64, overhead=2).where[1]]
        left.update(begun)
        done = sum(read == rows for read in left.values())
        assert max(begun) <= done + 1 and max(left.values()) <= rows
    assert done > 10


def test_an_item_is_what_was_written(marked: Corpus) -> None:
    for stream, sides in (("mmlm", 1), ("tlm", 2)):
        rows = reader(marked, stream).take(0, items=1500)
        for i in range(len(rows)):
            number, _, row = rows.where[:, i].tolist()
            languages = marked.sources[number].languages
            table = lengths_of(number, len(languages), SOURCES[marked.sources[number].name][2])
            for s in range(sides):
                column = languages.index(marked.languages[rows.languages[s, i]])
                name = ID + (number * 10_000 + row) * 8 + column
                start, length = rows.starts[s, i], rows.lengths[s, i]
                assert length == table[column, row] > 0
                assert set(rows.pool[start : start + length].tolist()) == {name} == {rows.text_ids[s, i]}


def test_all_translations_of_a_row_share_one_more_text_id(marked: Corpus) -> None:
    rows = reader(marked, "xlco").take(0, items=6000)
    shared: dict[tuple[int, ...], set[int]] = {}
    for i in range(len(rows)):
        shared.setdefault(tuple(rows.where[[0, 2], i].tolist()), set()).add(int(rows.text_ids[2, i]))
    assert all(len(ids) == 1 for ids in shared.values())
    assert len(set().union(*shared.values())) == len(shared)


def test_the_two_sides_of_a_pair_are_different_languages(marked: Corpus) -> None:
    rows = reader(marked, "xlco").take(0, items=3000)
    assert (rows.languages[0] != rows.languages[1]).all()


def batches(
    corpus: Corpus, world: int, steps: range, state: dict[str, dict[int, tuple[int, int]]], **how: Any
) -> list[Any]:
    """The global batches of `steps`: what all ranks of `world` take, in lane order. `state` is read, then updated."""
    lanes = 8
    before = {stream: dict(cursors) for stream, cursors in state.items()}
    by_step: list[dict[int, Any]] = [{} for _ in steps]
    for rank, stream in itertools.product(range(world), ("mmlm", "xlco")):
        own = list(range(rank, lanes, world))
        of_rank = reader(corpus, stream, lanes, own, **how)
        if before:
            of_rank.restore({lane: before[stream][lane] for lane in own})
        for batch, lane in itertools.product(by_step, own):
            rows = of_rank.take(lane, **({"tokens": 300, "overhead": 2} if stream == "mmlm" else {"items": 37}))
            batch.setdefault(lane, {})[stream] = content(rows)
        state.setdefault(stream, {}).update(of_rank.state())
    return [[batch[lane] for lane in range(lanes)] for batch in by_step]


@pytest.mark.parametrize("rounds", [0, ROUNDS])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_are_the_same_for_every_world_size(marked: Corpus, world: int, rounds: int) -> None:
    with lanes_share_below(rounds):
        assert batches(marked, world, range(12), {}) == batches(marked, 1, range(12), {})


@given(stop=st.integers(1, 29), worlds=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])))
@settings(max_examples=6, deadline=None)
def test_stopping_anywhere_and_going_on_at_any_world_size_changes_nothing(
    marked: Corpus, stop: int, worlds: tuple[int, int]
) -> None:
    state: dict[str, dict[int, tuple[int, int]]] = {}
    halves = batches(marked, worlds[0], range(stop), state) + batches(marked, worlds[1], range(stop, 30), state)
    unbroken: dict[str, dict[int, tuple[int, int]]] = {}
    assert halves == batches(marked, 1, range(30), unbroken)
    assert state == unbroken


@given(
    stop=st.integers(1, 29),
    worlds=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
    firsts=st.lists(st.integers(1, 120), min_size=1, max_size=3, unique=True).map(sorted),
    rounds=st.sampled_from([0, ROUNDS]),
)
@settings(max_examples=5, deadline=None)
def test_stopping_in_any_stage_changes_nothing(
    marked: Corpus, stop: int, worlds: tuple[int, int], firsts: list[int], rounds: int
) -> None:
    later = dict(zip(firsts, (0.1, 1.0, 0.0), strict=False))
    state: dict[str, dict[int, tuple[int, int]]] = {}
    unbroken: dict[str, dict[int, tuple[int, int]]] = {}
    with lanes_share_below(rounds):
        first = batches(marked, worlds[0], range(stop), state, later=later)
        halves = first + batches(marked, worlds[1], range(stop, 30), state, later=later)
        assert halves == batches(marked, 1, range(30), unbroken, later=later)
    assert state == unbroken


@pytest.mark.parametrize("rounds", [0, ROUNDS])
def test_every_item_comes_once_a_source_epoch_across_stages(marked: Corpus, rounds: int) -> None:
    with lanes_share_below(rounds):
        where = whole_windows(marked, "xlco", 4, 8, alpha=1.0, later={13: 0.0, 37: 0.5})
    for number in PAIRS:
        of_source = where[1:, where[0] == number]
        assert len(np.unique(of_source, axis=1).T) == of_source.shape[1]
        for epoch in range(int(of_source[0].max())):
            assert sorted(of_source[1, of_source[0] == epoch]) == list(range(SOURCES[marked.sources[number].name][2]))


@given(budget=st.integers(1, 2500), overhead=st.integers(0, 4), stream=st.sampled_from(["mmlm", "tlm"]))
@settings(max_examples=25, deadline=None)
def test_a_token_budget_takes_the_longest_prefix_that_fits(
    marked: Corpus, budget: int, overhead: int, stream: str
) -> None:
    by_budget, one_by_one = (reader(marked, stream, window_packs=1) for _ in range(2))
    for _ in range(4):
        taken = by_budget.take(0, tokens=budget, overhead=overhead)
        singles = [one_by_one.take(0, items=1) for _ in range(len(taken))]
        assert content(taken) == [item for single in singles for item in content(single)]
        used = int(taken.lengths.sum()) + overhead * len(taken)
        assert used <= budget or len(taken) == 1
        ahead = reader(marked, stream, window_packs=1)
        ahead.restore(by_budget.state())
        assert used + int(ahead.take(0, items=1).lengths.sum()) + overhead > budget
    assert by_budget.state() == one_by_one.state()


def test_a_batch_may_span_windows(marked: Corpus) -> None:
    whole, parts = reader(marked, "mmlm", window_packs=1), reader(marked, "mmlm", window_packs=1)
    together = content(whole.take(0, items=3000))
    assert together == [item for size in (1, 999, 2000) for item in content(parts.take(0, items=size))]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sources_are_mixed_by_p_to_the_alpha(marked: Corpus, alpha: float) -> None:
    where = whole_windows(marked, "mmlm", 1, 150, alpha=alpha)
    found = np.bincount(where[0], minlength=2) / where.shape[1]
    items = np.array([SOURCES[marked.sources[n].name][2] for n in MONO], float)
    assert found[:2] == pytest.approx(items**alpha / (items**alpha).sum(), abs=0.06)


def test_each_pair_of_languages_of_a_row_is_as_likely_in_either_order(marked: Corpus) -> None:
    rows = reader(marked, "xlco", alpha=1.0).take(0, items=40_000)
    full = {row for row in range(1300) if (lengths_of(2, 4, 1300)[:, row] > 0).all()}
    of_full = [i for i in range(len(rows)) if rows.where[0, i] == 2 and int(rows.where[2, i]) in full]
    counts = Counter(tuple(rows.languages[:, i].tolist()) for i in of_full)
    assert len(counts) == 12
    expected = len(of_full) / 12
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_a_row_has_another_pair_in_another_epoch(marked: Corpus) -> None:
    rows = reader(marked, "xlco", alpha=1.0).take(0, items=12_000)
    pairs: dict[int, set[tuple[int, ...]]] = {}
    for i in np.nonzero(rows.where[0] == 2)[0]:
        pairs.setdefault(int(rows.where[2, i]), set()).add(tuple(sorted(rows.languages[:, i].tolist())))
    full = {row for row in range(1300) if (lengths_of(2, 4, 1300)[:, row] > 0).all()}
    assert np.mean([len(pairs[row]) > 1 for row in full]) > 0.95


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_pivot_is_one_side_in_the_share_asked_for(marked: Corpus, share: float) -> None:
    rows = reader(marked, "tlm", pivot="en", pivot_share=share).take(0, items=20_000)
    has = lengths_of(2, 4, 1300) > 0
    english = marked.sources[2].languages.index("en")
    kept = [i for i in range(len(rows)) if rows.where[0, i] == 2 and has[:, int(rows.where[2, i])].all()]
    assert has[english].any() and len(kept) > 1000
    found = np.mean((rows.languages[:, kept] == marked.languages.index("en")).any(0))
    assert found == pytest.approx(share + (1 - share) / 2, abs=0.03)  # half of all pairs of four languages have it


def test_windows_are_shuffled_over_their_packs(marked: Corpus) -> None:
    rows = reader(marked, "tlm", window_packs=4).take(0, items=200)
    assert len(np.unique(rows.where[[0]] * 100 + rows.where[2] // ROWS)) >= 3


def test_neighbours_stay_partners_for_ever_in_the_same_two_languages_where_they_can(marked: Corpus) -> None:
    stream = reader(marked, "xlco", window_packs=1, grouping=Grouping(neighbours=True))
    partners: dict[tuple[int, int], set[int]] = {}
    same = differing = 0
    epochs = set()
    for _ in range(4000):
        two = stream.take(0, items=2)
        (source, _), epoch, (one, other) = two.where
        assert other == one + 1 and one % ROWS % 2 == 0
        partners.setdefault((int(source), int(one)), set()).add(int(other))
        epochs.add(int(epoch[0]))
        present = lengths_of(int(source), len(marked.sources[int(source)].languages), SOURCES["nway.talks"][2])
        common = (present[:, one] > 0) & (present[:, other] > 0) if source == 2 else np.ones(2, bool)
        if common.sum() >= 2:
            same += 1
            assert (two.languages[:, 0] == two.languages[:, 1]).all()
        else:
            differing += 1
    assert len(epochs) >= 3 and same > 0 and differing > 0
    assert all(len(found) == 1 for found in partners.values())


def test_an_odd_last_row_goes_with_the_first() -> None:
    rows, size = Grouping(neighbours=True).rows(5, 2)
    assert (rows.tolist(), size) == ([0, 1, 2, 3, 4, 0], 2)
    rows, size = Grouping(neighbours=True).rows(1, 2)
    assert (rows.tolist(), size) == ([0, 0], 2)


def test_several_pairs_of_a_row_come_one_after_the_other(marked: Corpus) -> None:
    stream = reader(marked, "xlco", window_packs=2, grouping=Grouping(pairs_per_row=3))
    assert stream.items == 3 * 1300 + 600
    rows = stream.take(0, items=6000)
    at = checked = 0
    while at < len(rows) - 3:
        size = 3 if rows.where[0, at] == 2 else 1
        group = rows.select(slice(at, at + size))
        assert len(set(group.text_ids[2].tolist())) == 1 and len(set(group.where[2].tolist())) == 1
        present = int((lengths_of(2, 4, 1300)[:, group.where[2, 0]] > 0).sum()) if size == 3 else 0
        if present > 2:  # three pairs of three sides; of four sides, the third pair is the first again
            pairs = {tuple(sorted(pair)) for pair in group.languages.T.tolist()}
            assert len(pairs) == (3 if present == 3 else 2)
            checked += 1
        at += size
    assert checked > 100


@pytest.mark.parametrize("pivot", ["xx", "de"])
def test_a_pivot_that_no_pair_can_have_is_refused(tmp_path: Path, pivot: str) -> None:
    corpus = Corpus(write(tmp_path, ["mono.de", "para.en-fi"]))
    with pytest.raises(UserError, match=rf"sampling.pivot.*{pivot!r}"):
        reader(corpus, "tlm", pivot=pivot, pivot_share=0.5)
    reader(corpus, "mmlm", pivot="en", pivot_share=0.5)  # monolingual text has no pairs to choose from


def test_a_damaged_pack_names_shard_and_place(tmp_path: Path) -> None:
    folder = write(tmp_path, ["mono.sw"])
    shard = folder / "mono.sw" / "mono.sw-00000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"mono\.sw-00000\.tar: the pack at byte 0 is damaged"):
        reader(Corpus(folder), "mmlm").take(0, items=1)


def test_a_missing_or_shortened_file_is_refused_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path, ["mono.sw"])
    shard = folder / "mono.sw" / "mono.sw-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"mono.sw-00000.tar has \d+ bytes"):
        Corpus(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"mono\.sw-00000\.tar is missing"):
        Corpus(folder)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=20, deadline=None)
def test_a_flipped_bit_in_an_index_is_refused_at_once(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    folder = write(tmp_path_factory.mktemp("damaged"), ["mono.sw"])
    index = folder / "mono.sw" / "index.npy"
    data = bytearray(index.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    index.write_bytes(data)
    with pytest.raises(UserError, match=r"mono\.sw.index\.npy is damaged"):
        Corpus(folder)
