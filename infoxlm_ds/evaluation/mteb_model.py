"""A model folder as mteb runs it (Muennighoff et al., 2023; Enevoldsen et al., 2025), on this project's own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.evaluation.neighbours import Vectors


def mteb_model(folder: Path, embedder: SentenceEmbedder) -> Any:
    """An encoder for `mteb.evaluate`. UserError if mteb is not installed."""
    if find_spec("mteb") is None:
        raise UserError("mteb is not installed: pip install 'infoxlm-ds[mteb]'")
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(AbsEncoder):  # type: ignore[misc]
        mteb_model_meta = ModelMeta.create_empty({"name": f"local/{folder.resolve().name}", "revision": "local"})

        def __init__(self) -> None:  # mteb's own loads a model by name
            pass

        def encode(self, inputs: Any, **kwargs: Any) -> Vectors:
            """L2-normalised vectors [n, D] of batches `{"text": [...]}`. Prompts are not used."""
            return embedder.embed([text for batch in inputs for text in batch["text"]], description="mteb")[0]

    return Encoder()


def evaluate_mteb(
    folder: Path,
    embedder: SentenceEmbedder,
    names: Sequence[str],
    languages: Sequence[str],
    out: Path,
    console: Console,
) -> None:
    """Run tasks by name and print their main scores. `languages`: as mteb writes them, such as deu; empty: all. mteb
    keeps its results in `out`, and a task that is there is not run again. UserError if mteb does not know a task, if no
    task has the languages, if `out` is no folder, or if data cannot be loaded."""
    model = mteb_model(folder, embedder)
    import mteb

    unknown = [
        name for name in names if name not in {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    ]
    if unknown:
        raise UserError(f"--task {unknown[0]}: mteb {mteb.__version__} has no such task: see `mteb available-tasks`")
    tasks = mteb.get_tasks(tasks=list(names), languages=list(languages) or None, exclude_superseded=False)
    if not len(tasks):
        raise UserError(f"--languages {','.join(languages)}: no task has them: mteb writes such as deu or deu-Latn")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    try:
        results = mteb.evaluate(model, tasks, cache=mteb.ResultCache(out))
    except (OSError, ConnectionError) as error:
        raise UserError(f"a task's data cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    print_results(results.task_results, console)


def print_results(results: Sequence[Any], console: Console) -> None:
    """A table with the main score of each task, subset and split."""
    table = Table(title="mteb", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("task", "subset", "split"):
        table.add_column(heading, no_wrap=True)
    table.add_column("main score", justify="right")
    for result in results:
        for split, subsets in result.scores.items():
            for scores in subsets:
                table.add_row(result.task_name, scores["hf_subset"], split, f"{scores['main_score']:.4f}")
    console.print(table)
