"""Exports a run's newest checkpoint as a Hugging Face folder, and checks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from infoxlm_ds.atomic import new_folder
from infoxlm_ds.checkpoint.store import read_state
from infoxlm_ds.checkpoint.weights import Weights, undamaged
from infoxlm_ds.config import Recipe, UserError, check
from infoxlm_ds.data.flat_batch import flat_batch
from infoxlm_ds.model.checksums import check_checksums, write_checksums
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.families import positions_of
from infoxlm_ds.model.pretrained import PROJECTION, saved_shape, strip_vocabulary

# Of hidden states of order 1, in fp32: attention on padded and on flat batches adds up in different orders.
TOLERANCE = 1e-4
SAMPLE = [
    "Hello, world!",
    "Zwei Sprachen, ein Satz.",
    "Ещё одно предложение, чуть длиннее первого.",
    "文の意味は同じです。",
]


def export(run: Path, out: Path) -> None:
    """Write model, tokenizer and configuration of the newest checkpoint of `run` to the new folder `out`.

    `out` loads with `AutoModelForMaskedLM` and `AutoTokenizer`. Its config names the layer and the pooling that the
    contrast trained (`universal_layer`, `sentence_pooling`). A projection is in `projection.safetensors`. The folder
    gets its name only after it was loaded again and gave the hidden states of the trained weights. UserError if there
    is no checkpoint, if it is damaged, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: remove it or export to another folder")
    latest = undamaged(run)
    recipe = check(Recipe, read_state(latest)["recipe"], str(latest))
    advice = f"train once more with run={run}, which writes {run / 'model'} anew"
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run / 'model'} is missing: {advice}")
    check_checksums(run / "model", advice)
    model = _trained(recipe, run, latest)
    disable_progress_bar()  # small files need no progress bars
    with new_folder(out) as folder:
        _write(model, recipe, run / "model", folder)
        write_checksums(folder)
        difference = _difference(model, folder)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{out}: hidden states differ by {difference:.1e} from the trained ones")
    print(f"{out}: {latest.name}, hidden states equal to {difference:.1e} when loaded again")


def _trained(recipe: Recipe, run: Path, latest: Path) -> InfoXLM:
    model, weights = saved_shape(run / "model", recipe.model), Weights(latest)
    with torch.no_grad():
        for name, parameter in model.named_parameters(prefix="model"):  # as the objective calls it
            parameter.copy_(weights[name])
    strip_vocabulary(model.lm)
    return model.eval()


def _write(model: InfoXLM, recipe: Recipe, tokenizer: Path, folder: Path) -> None:
    lm = model.lm
    lm.config.universal_layer, lm.config.sentence_pooling = recipe.model.universal_layer, recipe.model.pooling
    lm.save_pretrained(folder)
    own = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    own.model_max_length = positions_of(lm.config)  # with it, truncation cuts a longer text, which would crash
    own.save_pretrained(folder)
    if model.head.projection is not None:
        save_file({"weight": model.head.projection.weight.detach().contiguous()}, folder / PROJECTION)


@torch.no_grad()
def _difference(model: InfoXLM, folder: Path) -> float:
    """Largest difference of a hidden state between the trained model on a flat batch and the exported model on a padded
    one."""
    loaded: PreTrainedModel = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=False).eval()
    padded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(SAMPLE, padding=True, return_tensors="pt")
    real = padded["attention_mask"].bool()
    states = loaded(**padded, output_hidden_states=True).hidden_states
    batch = flat_batch(padded["input_ids"][real].numpy(), real.sum(1).numpy().astype(np.int64))
    hidden = model.body.embed(batch)
    worst = _largest(hidden - states[0][real])
    for layer, expected in enumerate(states[1:]):
        hidden = model.body.run(hidden, batch.layout, layer, layer + 1)
        worst = max(worst, _largest(hidden - expected[real]))
    return worst


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
