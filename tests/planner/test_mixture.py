"""What `infoxlm prep mix` expects is what readers take."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from infoxlm_ds.cli import app
from infoxlm_ds.data.batch import BatchBuilder
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.mixture import expected
from infoxlm_ds.planner.mixture import language_shares
from tests.corpus import small_recipe


def test_expected_items_and_languages_are_those_that_are_read(corpus: Path, tmp_path: Path) -> None:
    steps = ("optimizer.steps=300", "batch.lanes=1", "batch.tlm_tokens=600", "batch.xlco_pairs=20")
    pivot = ("sampling.pivot=en", "sampling.pivot_share=0.5")
    recipe, opened = small_recipe(corpus, tmp_path / "run", *steps, *pivot), Corpus(corpus)
    readers = BatchBuilder(recipe, opened, [0]).readers
    for task in ("tlm", "xlco"):
        overhead = opened.manifest.tokenizer.overhead(2)
        how: dict[str, int] = {"items": 20} if task == "xlco" else {"tokens": 600, "overhead": overhead}
        taken = np.concatenate([readers[task].take(0, **how).languages for _ in range(300)], axis=1)
        sources = expected(recipe, opened, task)
        assert taken.shape[1] == pytest.approx(sum(one.rows for one in sources), rel=0.05)
        read = Counter(np.array(opened.languages)[taken.ravel()].tolist())
        shares = {language: count / taken.size for language, count in read.items()}
        assert shares == pytest.approx(language_shares(opened, sources, recipe.sampling), abs=0.02)


def test_the_command_prints_every_stream_and_warns_of_many_passes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    small_recipe(corpus, tmp_path / "run", "optimizer.steps=6")
    path = tmp_path / "run.yaml"
    assert yaml.safe_load(path.read_text())["corpus"] == str(corpus)
    few = CliRunner().invoke(app, ["prep", "mix", str(path)])
    assert few.exit_code == 0, few.output
    for source in Corpus(corpus).sources:
        assert source.name in few.output
    assert "most_epochs" not in few.output and "mmlm: 6 steps" in few.output and "xlco: 6 steps" in few.output
    many = CliRunner().invoke(app, ["prep", "mix", str(path), "optimizer.steps=2000"]).output
    assert "nway.rows: xlco passes" in many and "sampling.most_epochs gives a part" in many
