"""Export for transformers: the masked LM with tokenizer in OUT, and the bare encoder in OUT/encoder.

They are two folders because no file of weights serves both classes of transformers without a warning: the encoder's
class reports weights of the LM head as unexpected and its pooler as missing, the masked LM's class reports a pooler.

Legend: D width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from infoxlm_ds.data.flat_batch import flat_batch
from infoxlm_ds.evaluation.embed import SentenceEmbedder
from infoxlm_ds.model.sentence_vector import write_projection
from infoxlm_ds.publish.cut import whole_encoder
from infoxlm_ds.publish.trained import SAMPLE, VECTORS, Trained, require

ENCODER = "encoder"
# Of hidden states of order 1, in fp32: attention on padded and on flat batches adds up in different orders.
STATES = 1e-4


def write_hugging_face(trained: Trained, folder: Path) -> None:
    """Write the masked LM, its projection and the encoder. The tokenizer is there already."""
    lm, encoder = trained.model.lm, whole_encoder(trained.model.lm)
    lm.save_pretrained(folder)
    encoder.save_pretrained(folder / ENCODER)
    trained.tokenizer.save_pretrained(folder / ENCODER)
    for place in (folder, folder / ENCODER):
        if trained.projection is not None:
            write_projection(trained.projection, place)


def check_hugging_face(trained: Trained, folder: Path) -> str:
    """Load both again and compare. Returns what was found; RuntimeError if they do not give the trained states and
    sentence vectors."""
    options = {"trust_remote_code": False, "local_files_only": True}
    masked_lm = AutoModelForMaskedLM.from_pretrained(folder, **options).eval()
    encoder = AutoModel.from_pretrained(folder / ENCODER, **options).eval()
    worst = max(hidden_state_difference(trained, model, folder) for model in (masked_lm, encoder))
    require(worst, STATES, folder, "hidden states differ by {} from the trained ones")
    embedders = [SentenceEmbedder(place, device="cpu") for place in (folder, folder / ENCODER)]
    vectors = max(trained.difference(one.embed(trained.texts, quiet=True, description="")[0]) for one in embedders)
    require(vectors, VECTORS, folder, "sentence vectors differ by {} from the trained ones")
    return f"hidden states equal to {worst:.1e}, vectors to {vectors:.1e}"


@torch.no_grad()
def hidden_state_difference(trained: Trained, loaded: PreTrainedModel, folder: Path) -> float:
    """Largest difference of a hidden state between the trained model on a flat batch and a model of transformers on a
    padded one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    padded = tokenizer(SAMPLE, padding=True, truncation=True, return_tensors="pt")
    real = padded["attention_mask"].bool()
    states = loaded(**padded, output_hidden_states=True).hidden_states
    batch = flat_batch(padded["input_ids"][real].numpy(), real.sum(1).numpy().astype(np.int64))
    ours = trained.model.body.states(batch)
    return max(_largest(hidden - expected[real]) for hidden, expected in zip(ours, states, strict=True))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
