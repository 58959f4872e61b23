"""The joint batch has XLM-R's layout, correct labels and mixup of two pairs. Lane and step are its key."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.batch import N_TEXTS, BatchBuilder, JointBatch
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.flat_batch import FlatBatch
from infoxlm_ds.data.manifest import Tokenizer
from infoxlm_ds.data.sequences import Sequences, Texts, assemble
from tests.corpus import small_recipe

LANES = [0, 1, 2, 3]
BOS, EOS = 0, 2


def _split(batch: FlatBatch | Sequences) -> list[list[int]]:
    lengths = batch.layout.lengths if isinstance(batch, FlatBatch) else batch.lengths
    ends = np.cumsum(np.asarray(lengths))
    return [batch.ids[end - n : end].tolist() for end, n in zip(ends, np.asarray(lengths), strict=True)]


def _queries(batch: JointBatch) -> list[list[int]]:
    return _split(batch.queries_alone)


def _build(recipe: Recipe, lane: int = 1, step: int = 3) -> JointBatch:
    return BatchBuilder(recipe, Corpus(recipe.corpus), LANES).build(lane, step)


def test_layout_is_the_tokenizers_for_one_text_and_for_two() -> None:
    pool = np.arange(10, 20, dtype=np.uint32)
    xlm_r = Tokenizer(name="x", vocab_size=20, special_ids={"bos": BOS, "eos": EOS}, files=())
    one = assemble(pool, Texts(np.array([[0, 4]]), np.array([[3, 1]])), xlm_r)
    assert _split(one) == [[BOS, 10, 11, 12, EOS], [BOS, 14, EOS]]
    texts = Texts(np.array([[0, 4], [7, 5]]), np.array([[3, 1], [2, 4]]))
    two = assemble(pool, texts, xlm_r)
    assert _split(two) == [[BOS, 10, 11, 12, EOS, EOS, 17, 18, EOS], [BOS, 14, EOS, EOS, 15, 16, 17, 18, EOS]]
    bert = Tokenizer(name="b", vocab_size=20, special_ids={"bos": 8, "eos": 9}, separators=1, files=())
    assert _split(assemble(pool, texts, bert)) == [[8, 10, 11, 12, 9, 17, 18, 9], [8, 14, 9, 15, 16, 17, 18, 9]]


def test_order_counts_and_labels(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run")
    batch = _build(recipe)
    special = set(Corpus(corpus).manifest.tokenizer.special_ids.values())
    # Without masking, the same keys give the same rows unchanged.
    plain = _build(small_recipe(corpus, tmp_path / "plain", "masking.probability=1e-12"))
    restored = batch.tokens.ids.clone()
    restored[batch.rows] = batch.labels
    assert (restored == plain.tokens.ids).all() and len(plain.rows) == 0
    assert not special & set(batch.labels.tolist())
    sequences = _split(plain.tokens)
    doubles = [sum(a == b == EOS for a, b in itertools.pairwise(s)) for s in sequences]
    n_mmlm = doubles.index(1)
    trunk = len(batch.trunk.lengths)
    assert doubles == [0] * n_mmlm + [1] * (trunk - n_mmlm) + [0] * (len(sequences) - trunk)
    assert all(s[0] == BOS and s[-1] == EOS for s in sequences)
    mmlm_tokens = sum(map(len, sequences[:n_mmlm]))
    assert mmlm_tokens <= recipe.batch.mmlm_tokens
    assert batch.counts == {
        "mmlm": int((batch.rows < mmlm_tokens).sum()),
        "tlm": int((batch.rows >= mmlm_tokens).sum()),
        "xlco": recipe.batch.xlco_pairs,
    }
    assert batch.text_ids.shape == (recipe.batch.xlco_pairs, N_TEXTS["off"])
    assert len(batch.names["xlco"]) == recipe.batch.xlco_pairs


def test_queries_and_keys_are_the_sides_of_the_same_pairs(corpus: Path, tmp_path: Path) -> None:
    symmetric = _build(small_recipe(corpus, tmp_path / "both"))
    single = _build(small_recipe(corpus, tmp_path / "one", "contrast.symmetric=false"))
    gradient = _build(small_recipe(corpus, tmp_path / "gradient", "contrast.keys=gradient"))
    assert symmetric.keys is not None and single.keys is not None and gradient.keys is None
    pairs = len(single.text_ids)
    both = _queries(symmetric)
    assert both == _split(symmetric.keys) == _queries(gradient)
    assert both[:pairs] == _queries(single)
    assert both[pairs:] == _split(single.keys)
    assert all(a != b for a, b in zip(both[:pairs], both[pairs:], strict=True))


@pytest.mark.parametrize("overrides", [[], ["contrast.symmetric=false"], ["contrast.keys=gradient"]])
def test_each_text_counts_once_whichever_encoder_reads_it(corpus: Path, tmp_path: Path, overrides: list[str]) -> None:
    batch = _build(small_recipe(corpus, tmp_path / "run", *overrides))
    pairs = _build(small_recipe(corpus, tmp_path / "all", "contrast.keys=gradient"))
    assert batch.text_tokens == batch.trunk.tokens + pairs.queries.tokens


def test_a_micro_batch_is_a_function_of_lane_and_step(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", "contrast.mixup=paper")
    first, again = _build(recipe), _build(recipe)
    assert (first.tokens.ids == again.tokens.ids).all() and (first.text_ids == again.text_ids).all()
    other = _build(recipe, step=4)  # the same rows, other masks and mixtures
    assert first.rows.tolist() != other.rows.tolist()
    assert (first.text_ids == other.text_ids).all()


def test_mixup_joins_two_pairs_crossed_and_flipped_by_chance(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(
        corpus, tmp_path / "mixed", "contrast.mixup=paper", "batch.xlco_pairs=40", "contrast.queue.size=400"
    )
    apart = small_recipe(corpus, tmp_path / "apart", "batch.xlco_pairs=80", "contrast.queue.size=400")
    mixed, pairs = _build(recipe), _build(apart)
    assert (mixed.text_ids.reshape(80, 3) == pairs.text_ids).all()
    sides = _queries(pairs)
    content = [side[1:-1] for side in sides]
    made = _queries(mixed)
    kinds = set()
    for item in range(40):
        c, d = 2 * item, 2 * item + 1
        for crossed in (False, True):
            for flips in ((False, False), (False, True), (True, False), (True, True)):
                texts = [[content[c], content[d + 80 * crossed]], [content[c + 80], content[d + 80 * (not crossed)]]]
                expected = []
                for two, flip in zip(texts, flips, strict=True):
                    one, other = reversed(two) if flip else two
                    expected.append([BOS, *one, EOS, EOS, *other, EOS])
                if expected == [made[item], made[item + 40]]:
                    kinds.add((crossed, flips))
                    break
    assert len(kinds) == 8  # every way occurs


def test_the_references_mixup_keeps_sides_in_one_language(corpus: Path, tmp_path: Path) -> None:
    """Neighbours of the corpus are joined in a random order. A side is not code-switched if both have
    two languages in common."""
    how = ("batch.xlco_pairs=40", "contrast.queue.size=400", "contrast.mixup=reference")
    batch = _build(small_recipe(corpus, tmp_path / "run", *how))
    made, ids = _queries(batch), batch.text_ids.reshape(40, 2, 3)
    assert len(made) == 80 and len(np.unique(ids[:, :, 2].numpy())) == 80
    same = [one == other for one, other in batch.names["xlco"].tolist()]
    assert sum(same) > 30  # the others have no two languages in common
    again = _build(small_recipe(corpus, tmp_path / "again", *how))
    assert (again.tokens.ids == batch.tokens.ids).all()


def test_several_pairs_of_a_row_are_in_one_micro_batch(corpus: Path, tmp_path: Path) -> None:
    how = ("contrast.same_text=positive", "contrast.pairs_per_row=2")
    batch = _build(small_recipe(corpus, tmp_path / "run", *how))
    assert (batch.text_ids[::2, 2] == batch.text_ids[1::2, 2]).all()
    assert len(np.unique(batch.text_ids[:, 2].numpy())) == len(batch.text_ids) // 2


@pytest.mark.parametrize("overrides", [[], ["contrast.symmetric=false"], ["contrast.keys=gradient"]])
def test_hard_negatives_are_those_of_their_rows(
    corpus_with_negatives: Path, tmp_path: Path, overrides: list[str]
) -> None:
    """At most so many of a row, each once, after the sides, in the language of the second side if there are some."""
    corpus = Corpus(corpus_with_negatives)
    number = next(i for i, source in enumerate(corpus.sources) if source.kind == "nway")
    of_text: dict[int, set[int]] = {}
    for pack in (corpus.pack(number, i) for i in range(corpus.sources[number].packs)):
        for row, text_id in zip(pack.negatives.rows, pack.negatives.text_ids.astype(np.int64), strict=True):
            for text in pack.text_ids[:, row].astype(np.int64).tolist():
                of_text.setdefault(text, set()).add(int(text_id))
    run, most = tmp_path / "run", 3
    plain = _build(small_recipe(corpus_with_negatives, run, *overrides))
    batch = _build(small_recipe(corpus_with_negatives, run, f"contrast.hard_negatives={most}", *overrides))
    assert (batch.text_ids == plain.text_ids).all() and len(plain.hard_ids) == 0
    expected = [ids for ids in map(of_text.get, batch.text_ids[:, 0].tolist()) if ids]
    assert 0 < len(expected) < len(batch.text_ids)
    drawn = batch.hard_ids[:, 0].tolist()
    assert len(drawn) == sum(min(most, len(ids)) for ids in expected)
    for ids in expected:
        own, drawn = drawn[: min(most, len(ids))], drawn[min(most, len(ids)) :]
        assert len(set(own)) == len(own) and set(own) <= ids
    read = batch.queries if batch.keys is None else batch.keys.layout
    before = plain.queries if plain.keys is None else plain.keys.layout
    hard = read.lengths[len(before.lengths) :]
    assert len(hard) == len(batch.hard_ids) == (batch.sides if batch.keys is None else batch.key_sides).hard
    assert batch.text_tokens == plain.text_tokens + int(hard.sum())


def test_hard_negatives_that_no_row_has_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contrast\.hard_negatives 1: no row of .* has negatives"):
        _build(small_recipe(corpus, tmp_path / "run", "contrast.hard_negatives=1"))


def test_a_step_larger_than_the_corpus_is_refused_by_name(corpus: Path, tmp_path: Path) -> None:
    for key, value in (("xlco_pairs", 101), ("tlm_tokens", 10**7), ("mmlm_tokens", 10**7)):
        with pytest.raises(UserError, match=f"batch.{key}"):
            _build(small_recipe(corpus, tmp_path / key, f"batch.{key}={value}"))
