"""An exported model in mteb: bitext mining, STS and classification on tasks made here, by mteb's own code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.mteb_model import evaluate_mteb, mteb_model, print_results

mteb = pytest.importorskip("mteb")
abstasks = pytest.importorskip("mteb.abstasks")

ENGLISH = ["The lamp is on.", "Open the door.", "The kitchen is warm.", "Restart now"]
GERMAN = ["Das Licht ist an.", "Öffne die Tür.", "Die Küche ist warm.", "Jetzt neu starten"]


def _task(base: Any, kind: str, columns: dict[str, dict[str, list[Any]]], score: str) -> Any:
    """A task of one of mteb's classes on these columns of each split."""
    from datasets import Dataset, DatasetDict

    class Made(base):  # type: ignore[misc]
        metadata = mteb.TaskMetadata(
            name="Made",
            description="made up",
            dataset={"path": "made/up", "revision": "1"},
            type=kind,
            eval_langs=["eng-Latn", "deu-Latn"],
            main_score=score,
        )

        def load_data(self, **kwargs: Any) -> None:
            self.dataset = DatasetDict({split: Dataset.from_dict(rows) for split, rows in columns.items()})
            self.data_loaded = True

    return Made()


def _score(task: Any, folder: Path) -> float:
    results = mteb.evaluate(mteb_model(folder, SentenceEmbedder(folder)), task, cache=None, show_progress_bar=False)
    screen = io.StringIO()
    print_results(results.task_results, Console(file=screen))
    assert "Made" in screen.getvalue()
    return float(results.task_results[0].scores["test"][0]["main_score"])


def test_bitext_mining(model_folder: Path) -> None:
    pairs = {"test": {"sentence1": ENGLISH, "sentence2": GERMAN}}
    found = _score(_task(abstasks.AbsTaskBitextMining, "BitextMining", pairs, "accuracy"), model_folder)
    english, german = (SentenceEmbedder(model_folder).embed(texts)[0] for texts in (ENGLISH, GERMAN))
    assert found == ((english @ german.T).argmax(1) == np.arange(4)).mean()


def test_sts(model_folder: Path) -> None:
    rows: dict[str, dict[str, list[Any]]] = {
        "test": {"sentence1": ENGLISH, "sentence2": GERMAN, "score": [5.0, 1.0, 3.0, 2.0]}
    }
    found = _score(_task(abstasks.AbsTaskSTS, "STS", rows, "cosine_spearman"), model_folder)
    english, german = (SentenceEmbedder(model_folder).embed(texts)[0] for texts in (ENGLISH, GERMAN))
    assert found == pytest.approx(spearmanr((english * german).sum(1), [5, 1, 3, 2]).statistic)


def test_classification(model_folder: Path) -> None:
    rows: dict[str, list[Any]] = {"text": [ENGLISH[0], GERMAN[1]] * 10, "label": [0, 1] * 10}
    splits = {"train": rows, "test": rows}
    assert _score(_task(abstasks.AbsTaskClassification, "Classification", splits, "accuracy"), model_folder) == 1


def test_mistakes_are_one_line(model_folder: Path, tmp_path: Path) -> None:
    embedder = SentenceEmbedder(model_folder)
    with pytest.raises(UserError, match=r"--task Nothing: mteb .* has no such task"):
        evaluate_mteb(model_folder, embedder, ["Nothing"], [], tmp_path, Console())
    with pytest.raises(UserError, match="--languages de: no task has them: mteb writes such as deu or deu-Latn"):
        evaluate_mteb(model_folder, embedder, ["STS12"], ["de"], tmp_path, Console())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file cannot be written"):
        evaluate_mteb(model_folder, embedder, ["STS12"], [], tmp_path / "file", Console())
    with pytest.raises(UserError, match="a task's data cannot be loaded: "):  # no hub here
        evaluate_mteb(model_folder, embedder, ["STS12"], [], tmp_path, Console())
