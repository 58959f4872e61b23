"""The code of a model card. It works in the folder above the export, and with the export's name on a hub."""

from __future__ import annotations

import json
from collections.abc import Sequence

from infoxlm_ds.model.sentence_vector import PROJECTION, SentenceVector

SENTENCES = '["Open the door.", "Öffne die Tür."]'


def usage(name: str, forms: Sequence[str], vector: SentenceVector) -> list[str]:
    """A sentence and a block of code for each form that was exported. The code leaves the sentence vectors of two
    sentences in `vectors`. `name`: of the folder."""
    quoted = json.dumps(name, ensure_ascii=False)
    parts = [f"In the folder above `{name}`; if the model is on a hub, write its name there instead of {quoted}."]
    if "sentence-transformers" in forms:
        parts += ["With sentence-transformers:", _sentence_transformers(quoted)]
    if "hf" in forms:
        parts += ["With transformers alone:", _transformers(quoted, vector)]
        parts += [f"To fine-tune, load the encoder as above, or the masked LM: `AutoModelForMaskedLM` with {quoted}."]
    if "onnx" in forms:
        parts += ["With onnxruntime:", _onnx(quoted)]
    return parts


def _sentence_transformers(name: str) -> str:
    return f"""```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer({name}).encode({SENTENCES})
print(vectors @ vectors.T)
```"""


def _transformers(name: str, vector: SentenceVector) -> str:
    pooled = "(states * mask).sum(1) / mask.sum(1)" if vector.pooling == "mean" else "states[:, 0]"
    load, cached, project = "", "", ""
    if vector.projected:
        load, cached = "from safetensors.torch import load_file\n", "from transformers.utils import cached_file\n"
        project = f'pooled = pooled @ load_file(cached_file({name}, "{PROJECTION}"))["weight"].T\n'
    return f"""```python
import torch
{load}from transformers import AutoModel, AutoTokenizer
{cached}
tokenizer, model = AutoTokenizer.from_pretrained({name}), AutoModel.from_pretrained({name}, subfolder="encoder")
inputs = tokenizer({SENTENCES}, padding=True, truncation=True, return_tensors="pt")
mask = inputs["attention_mask"][:, :, None]
with torch.no_grad():
    states = model(**inputs, output_hidden_states=True).hidden_states[{vector.layer}]
pooled = {pooled}
{project}vectors = torch.nn.functional.normalize(pooled, dim=1).numpy()
print(vectors @ vectors.T)
```"""


def _onnx(name: str) -> str:
    return f"""```python
import onnxruntime
from transformers import AutoTokenizer
from transformers.utils import cached_file

session = onnxruntime.InferenceSession(cached_file({name}, "onnx/model.onnx"))
inputs = AutoTokenizer.from_pretrained({name})({SENTENCES}, padding=True, truncation=True, return_tensors="np")
(vectors,) = session.run(None, {{key: inputs[key] for key in ("input_ids", "attention_mask")}})
print(vectors @ vectors.T)
```"""
