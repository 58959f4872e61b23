"""Export for sentence-transformers: `modules.json` and a subfolder for each module.

The first module is the encoder cut at the layer of the sentence vector, so that what the library pools is that layer.
The files are written without the library, in the form that it saves itself.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from infoxlm_ds.publish.cut import cut_encoder
from infoxlm_ds.publish.trained import VECTORS, Trained, require

ENCODER, POOLING, DENSE, NORMALIZE = "0_Transformer", "1_Pooling", "2_Dense", "3_Normalize"
BASE = "sentence_transformers.base.modules"
TYPES = {
    ENCODER: f"{BASE}.transformer.Transformer",
    POOLING: "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    DENSE: f"{BASE}.dense.Dense",
    NORMALIZE: f"{BASE}.normalize.Normalize",
}


def write_sentence_transformers(trained: Trained, folder: Path) -> None:
    """Write all modules and the files that name them."""
    width, projected = trained.model.lm.config.hidden_size, trained.vector.projected
    parts = [ENCODER, POOLING, DENSE, NORMALIZE] if projected else [ENCODER, POOLING, NORMALIZE]
    for part in parts:
        (folder / part).mkdir()
    _write_encoder(trained, folder / ENCODER)
    pooling = {"embedding_dimension": width, "pooling_mode": trained.vector.pooling, "include_prompt": True}
    _write(folder / POOLING / "config.json", pooling)
    if projected:
        assert trained.projection is not None
        dense = {"in_features": width, "out_features": width, "bias": False}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"
        _write(folder / DENSE / "config.json", dense)
        save_file({"linear.weight": trained.projection.contiguous()}, folder / DENSE / "model.safetensors")
    _write(folder / NORMALIZE / "config.json", {"module_input_name": "sentence_embedding"})
    modules = [{"idx": i, "name": str(i), "path": part, "type": TYPES[part]} for i, part in enumerate(parts)]
    _write(folder / "modules.json", modules)
    settings: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer"} | settings)


def _write_encoder(trained: Trained, folder: Path) -> None:
    cut = cut_encoder(trained.model.lm, trained.vector.layer)
    cut.model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    settings: dict[str, Any] = {"max_seq_length": trained.positions, "do_lower_case": False}
    if cut.state is not None:
        output = {"method": "forward", "method_output_name": ["hidden_states", cut.state]}
        settings |= {"modality_config": {"text": output}, "module_output_name": "token_embeddings"}
    _write(folder / "sentence_bert_config.json", settings)


def check_sentence_transformers(trained: Trained, folder: Path) -> str:
    """Load the folder with sentence-transformers and compare its vectors with ours. Returns what was found;
    RuntimeError if they differ."""
    if find_spec("sentence_transformers") is None:
        return "not checked, as the library is not installed: pip install 'infoxlm-ds[sentence-transformers]'"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors = model.encode(trained.texts, batch_size=4, show_progress_bar=False)
    difference = trained.difference(vectors)
    require(difference, VECTORS, folder, "vectors of sentence-transformers differ by {} from ours")
    return f"vectors equal to {difference:.1e}"


def _write(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
