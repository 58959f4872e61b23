"""Of texts that are nearly equal one stays, whatever the order, the number of tasks, and the file."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.filters.settings import NearDuplicates
from data_prep.near_duplicates import SHINGLE, ChooseTask, LinkTask, Record, band_keys, choose, goes, link
from data_prep.run import How
from data_prep.table import Table
from infoxlm_ds.config import UserError
from infoxlm_ds.data.corpus import Corpus
from tests.data_prep.small import describe, stored, write_rows

DEFAULT = NearDuplicates()


def _jaccard(one: list[int], other: list[int]) -> float:
    a, b = ({tuple(ids[i : i + SHINGLE]) for i in range(max(1, len(ids) - SHINGLE + 1))} for ids in (one, other))
    return len(a & b) / len(a | b)


def test_the_share_of_pairs_that_meet_is_that_of_minhash() -> None:
    """1 - (1 - s^R)^B for the Jaccard similarity s (Leskovec et al., Mining of Massive Datasets, 3.4)."""
    chance = random.Random(1)
    met: dict[float, list[bool]] = {0.5: [], 0.7: [], 0.9: []}
    for changed, found in zip((18, 9, 3), met.values(), strict=True):
        similarities = []
        for _ in range(400):
            one = [chance.randrange(10_000) for _ in range(100)]
            start = chance.randrange(100 - changed)
            other = [*one[:start], *(chance.randrange(10_000) for _ in range(changed)), *one[start + changed :]]
            keys = band_keys(np.array([*one, *other], np.uint32), np.array([100, 100]), DEFAULT)
            similarities.append(_jaccard(one, other))
            found.append(bool((keys[0] == keys[1]).any()))
        s = float(np.mean([1 - (1 - x**DEFAULT.rows) ** DEFAULT.bands for x in similarities]))
        assert np.mean(found) == pytest.approx(s, abs=0.08), f"{changed} of 100 pieces changed"


@given(st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=9), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_keys_depend_on_the_text_alone(texts: list[list[int]]) -> None:
    lengths = np.array([len(text) for text in texts])
    together = band_keys(np.array(list(itertools.chain.from_iterable(texts)), np.uint32), lengths, DEFAULT)
    for text, keys in zip(texts, together, strict=True):
        assert (band_keys(np.array(text, np.uint32), np.array([len(text)]), DEFAULT)[0] == keys).all()
    for (one, a), (other, b) in itertools.combinations(zip(texts, together, strict=True), 2):
        if one == other:
            assert (a == b).all()
        elif _jaccard(one, other) == 0:
            assert (a != b).all()


@given(
    links=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=15),
    parts=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_of_linked_rows_the_smallest_stays(
    tmp_path_factory: pytest.TempPathFactory, links: list[tuple[int, int]], parts: int, seed: int
) -> None:
    """Compared with sets that are joined one by one."""
    folder, groups = tmp_path_factory.mktemp("links"), {i: {i} for i in range(10)}
    for one, other in links:
        joined = groups[one] | groups[other]
        groups |= dict.fromkeys(joined, joined)
    records = np.zeros(2 * len(links), Record)
    for number, pair in enumerate(links):  # the two ends of a link share a key
        for end, row in enumerate(pair):
            records[2 * number + end] = (number * 7919 % 2**64, (row // 2, row % 2))
    np.random.default_rng(seed).shuffle(records)
    for part in range(parts):
        (folder / f"signed-{part}").mkdir()
        for number in range(parts):
            records[records["band"] % parts == number][part::parts].tofile(folder / f"signed-{part}" / f"s-{number}")
    signed = tuple(folder / f"signed-{part}" for part in range(parts))
    for part in range(parts):
        link(LinkTask("s", part, signed), folder / f"links-{part}")
    choose(ChooseTask(tuple(folder / f"links-{part}" for part in range(parts))), folder / "chosen")
    expected = [(row // 2, row % 2) for row in range(10) if row != min(groups[row])]
    assert list(map(tuple, np.load(folder / "chosen").tolist())) == expected
    keys = np.array([(row // 2, row % 2) for row in range(10)], np.uint64)
    ones = np.ones(10, np.uint16)
    table = Table(keys, ones, ones, ones, np.ones(10, np.uint64), np.ones(10, np.uint32))
    assert goes(table, np.load(folder / "chosen")).tolist() == [tuple(key) in expected for key in keys.tolist()]


def _texts(count: int, seed: int) -> list[str]:
    """Long texts, of which each second one is the one before with its last word changed."""
    words = ["one", "two", "three", "four", "five", "six", "red", "green", "blue", "door", "window", "light", "water"]
    chance, texts = random.Random(seed), list[str]()
    for number in range(count // 2):
        text = [chance.choice(words) for _ in range(60)]
        texts += [" ".join(text), " ".join([*text[:-1], f"word{number}"])]
    return texts


@pytest.mark.parametrize("kind", ["mono", "para"])
def test_one_of_two_stays_in_a_corpus(corpus: Path, tmp_path: Path, kind: str) -> None:
    """The same bytes from any order and number of tasks; a count and samples."""
    texts = _texts(60, 3)
    written = []
    for name, order in (("one", texts), ("two", texts[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        source: dict[str, Any] = {"name": f"{kind}.x", "kind": kind, "format": "jsonl", "path": "rows.jsonl"}
        if kind == "mono":
            lines = (json.dumps({"text": text, "language": "en"}) + "\n" for text in order)
            (folder / "rows.jsonl").write_text("".join(lines))
        else:
            write_rows(
                folder / "rows.jsonl", [{"de": f"Satz {texts.index(text)} {text}", "en": text} for text in order]
            )
        filters: dict[str, Any] = {"near_duplicates": {}, "repetition": None, "copied_words": None}
        tokenizer = {"path": str(corpus / "tokenizer")}
        description = describe(folder, tokenizer, [source], max_tokens=400, filters=filters)
        with pytest.MonkeyPatch.context() as sizes:
            if name == "two":
                sizes.setattr("data_prep.inputs.SMALLEST_BLOCK", 2**11)
                sizes.setattr("data_prep.build.BUCKET", 2**11)
            build(description, folder / "corpus", How(workers=1 if name == "one" else 2))
        made = Corpus(folder / "corpus")
        assert made.manifest.counts["near_duplicates"] == 30
        samples = json.loads((folder / "corpus" / "samples.json").read_text())["near_duplicates"]
        (sample,) = samples[0]["texts"].values()
        assert len(samples) == 10 and any(text[:200] in sample for text in texts)
        written.append(
            {json.dumps(row, sort_keys=True) for row in stored(made, "mono.en" if kind == "mono" else "para.x")}
        )
    assert written[0] == written[1] and len(written[0]) == 30


def test_settings_have_bounds(corpus: Path, tmp_path: Path) -> None:
    source = {"name": "mono.en", "kind": "mono", "format": "text", "path": "x.txt", "languages": ["en"]}
    (tmp_path / "x.txt").write_text("a text\n")
    description = describe(tmp_path, {"vocab_size": 50}, [source], filters={"near_duplicates": {"bands": 0}})
    with pytest.raises(UserError, match=r"near_duplicates\.bands"):
        build(description, tmp_path / "corpus")
