"""Exports a checkpoint of a run for other libraries, in one folder, and checks that they give what was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from infoxlm_ds.atomic import new_folder
from infoxlm_ds.checkpoint.store import read_state
from infoxlm_ds.checkpoint.weights import undamaged
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.model.checksums import check_checksums, write_checksums
from infoxlm_ds.publish.card import CARD, write_card
from infoxlm_ds.publish.choose import best_step
from infoxlm_ds.publish.hugging_face import check_hugging_face, write_hugging_face
from infoxlm_ds.publish.onnx import check_onnx, require_onnx, write_onnx
from infoxlm_ds.publish.sentence_transformers import check_sentence_transformers, write_sentence_transformers
from infoxlm_ds.publish.trained import Trained, read_trained
from infoxlm_ds.reading import check

FORMS: dict[str, tuple[Callable[[Trained, Path], None], Callable[[Trained, Path], str]]] = {
    "hf": (write_hugging_face, check_hugging_face),
    "sentence-transformers": (write_sentence_transformers, check_sentence_transformers),
    "onnx": (write_onnx, check_onnx),
}
DEFAULT = ("hf", "sentence-transformers")


def export(
    run: Path,
    out: Path,
    forms: Sequence[str] = DEFAULT,
    *,
    step: int | None = None,
    best: bool = False,
    layer: int | None = None,
) -> None:
    """Write the newest checkpoint of `run`, or that of `step`, or the best by the probe, to the new folder `out`.

    `forms`: for which libraries, names in FORMS. `layer`: sentence vectors are the plain states of this layer; None: as
    the run trained them. The folder gets its name only after each form was loaded again and gave the trained states and
    vectors. UserError if there is no such checkpoint or layer, if the checkpoint is damaged, if `out` exists, or if a
    package is missing.
    """
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another folder")
    if step is not None and best:
        raise UserError("--step and --best exclude each other: give one of them")
    if unknown := [form for form in forms if form not in FORMS]:
        raise UserError(f"--as {unknown[0]}: give one of {', '.join(FORMS)}, and --as again for another one")
    if "onnx" in forms:
        require_onnx()
    checkpoint = undamaged(run, best_step(run) if best else step)
    state = read_state(checkpoint)
    trained = _trained(run, checkpoint, state, layer)
    transformers_logging.disable_progress_bar()  # small files need no progress bars
    with new_folder(out) as folder:
        trained.tokenizer.save_pretrained(folder)
        chosen = {form: FORMS[form] for form in forms}
        for write, _ in chosen.values():
            write(trained, folder)
        found = {form: examine(trained, folder) for form, (_, examine) in chosen.items()}
        missing = write_card(folder, out, forms, trained, run, state)
        write_checksums(folder)
    print(f"{out}: {checkpoint.name}, sentence vectors: {_describe(trained)}")
    for form, result in found.items():
        print(f"  {form}: {result}")
    print(f"  {CARD}: a model card{', ' * bool(missing)}{missing}")


def _trained(run: Path, checkpoint: Path, state: dict[str, Any], layer: int | None) -> Trained:
    recipe = check(Recipe, state["recipe"], str(checkpoint))
    advice = f"train once more with run={run}, which writes {run / 'model'} anew"
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run / 'model'} is missing: {advice}")
    check_checksums(run / "model", advice)
    return read_trained(recipe, run, checkpoint, layer)


def _describe(trained: Trained) -> str:
    vector, projection = trained.vector, trained.projection
    without = "" if projection is None else ", without the projection"
    return f"layer {vector.layer}, {vector.pooling} pooling{', projection' if vector.projected else without}"
