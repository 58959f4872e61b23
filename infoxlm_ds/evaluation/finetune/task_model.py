"""A model with a head for a task: transformers' own class, run on flat batches.

Legend: T tokens, S sequences, D width, C labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from infoxlm_ds.config import UserError
from infoxlm_ds.data.flat_batch import FlatBatch
from infoxlm_ds.evaluation.embed import load_folder
from infoxlm_ds.evaluation.finetune.items import NONE
from infoxlm_ds.evaluation.finetune.packing import Batch
from infoxlm_ds.evaluation.finetune.tasks import Kind
from infoxlm_ds.model.encoder import Body
from infoxlm_ds.model.heads import first_rows
from infoxlm_ds.model.loading import loading

CLASSES = {
    "pair": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "span": AutoModelForQuestionAnswering,
}
FRESH = ("classifier.", "pooler.", "qa_outputs.")  # weights that may start at random
REFUSED = {"modernbert"}  # its heads and its names of dropout differ


class TaskModel(nn.Module):
    """`model`: a model of transformers with a head for `kind`."""

    def __init__(self, model: Any, kind: Kind) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of the batch's labels. An answer has two: where it begins and ends in its sequence."""
        logits, labels = self.logits(batch.flat).float(), batch.labels
        if self.kind == "span":
            layout = batch.flat.layout
            by_sequence = logits.new_full((len(layout.lengths), layout.longest, 2), -torch.inf)
            by_sequence[layout.sequence, layout.positions] = logits
            logits, labels = by_sequence, labels.view(-1, 2)
        return cross_entropy(logits, labels, ignore_index=NONE)

    def logits(self, flat: FlatBatch) -> Tensor:
        """[S, C] of pairs, [T, C] of words or [T, 2] of answers, equal to those of `model` on padded batches."""
        body = Body(self.model.base_model)
        first = first_rows(flat.layout) if self.kind == "pair" else None
        hidden = body.run(body.embed(flat), flat.layout, 0, len(body.layers), first)
        if self.kind == "span":
            out: Tensor = self.model.qa_outputs(hidden)
        elif self.kind == "token":
            out = self.model.classifier(self.model.dropout(hidden))
        elif self.model.config.model_type == "bert":
            out = self.model.classifier(self.model.dropout(self.model.bert.pooler(hidden[:, None])))
        else:
            out = self.model.classifier(hidden[:, None])
        return out


def load_task_model(folder: Path, kind: Kind, labels: list[str], dropout: float, seed: int) -> tuple[TaskModel, Any]:
    """The model in a folder, with a head for a task, and its tokenizer. A new head starts at random, by `seed`.
    UserError if the folder cannot be loaded, or if its kind of model has no head here."""
    _refuse_some(folder)
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, tokenizer = load_folder(
        folder,
        CLASSES[kind],
        FRESH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **(names if labels else {}),
    )
    if not tokenizer.is_fast:
        raise UserError(f"model folder {folder}: its tokenizer needs a tokenizer.json, which says where tokens begin")
    # Flat batches have no token types. So the tokenizer that is kept with the model must not give any.
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    return TaskModel(model, kind), tokenizer


def _refuse_some(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return  # loading says so
    with loading(f"model folder {folder} cannot be loaded"):
        name = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    if name in REFUSED:
        raise UserError(f"model folder {folder} is a {name}, which cannot be fine-tuned here")
