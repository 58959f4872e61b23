"""Sentence vectors from a model folder in Hugging Face format.

Legend: n sentences, b sentences of one batch, t tokens, D width, L layers asked for. Layers are numbered as in
Hugging Face's `hidden_states`: 0 is the embeddings, i the output of the i-th layer.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from infoxlm_ds.config import UserError
from infoxlm_ds.evaluation import Pooling
from infoxlm_ds.model.families import family_of, part, positions_of

Vectors = npt.NDArray[np.float32]

log = logging.getLogger(__name__)


class SentenceEmbedder:
    """A model and its tokenizer, ready to embed; in fp32, on the GPU if there is one.

    `layers` are the layers to pool: "all", one number, or None for the config's `universal_layer`, else the last.
    `pooling` None means the config's `sentence_pooling`, else mean. Layers above the highest one asked for do not run.
    Raises UserError for a folder without model or tokenizer, weights that do not cover the encoder, or a layer out of
    range.
    """

    def __init__(
        self,
        folder: Path,
        layers: int | Literal["all"] | None = None,
        pooling: Pooling | None = None,
        device: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.tokenizer = _load(folder)
        config = self.model.config
        self.layers = _chosen_layers(layers, config, folder)
        self.pooling: Pooling = getattr(config, "sentence_pooling", "mean") if pooling is None else pooling
        self.max_tokens = min(self.tokenizer.model_max_length, positions_of(config))
        self._outputs = self._outputs_by_layer()
        self.model.to(self.device).eval()

    def _outputs_by_layer(self) -> list[torch.nn.Module]:
        """What gives `hidden_states[i]`. Takes the layers out that nobody asked for."""
        family = family_of(self.model.config)
        layers = part(self.model, family.layers)
        norm = part(self.model, family.norm) if self.layers[-1] == len(layers) else None
        del layers[self.layers[-1] :]
        outputs = [self.model.embeddings, *layers]
        return outputs if norm is None else [*outputs[:-1], norm]

    def embed(self, sentences: list[str], batch_size: int = 64, description: str = "embedding") -> Vectors:
        """L2-normalised vectors [L, n, D] in the order of `sentences`; a bar with `description` runs on a terminal."""
        token_ids = self._tokenize(sentences)
        by_length = sorted(range(len(sentences)), key=lambda i: len(token_ids[i]), reverse=True)
        batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
        vectors = np.empty((len(self.layers), len(sentences), self.model.config.hidden_size), dtype=np.float32)
        for batch in _progress(batches, description):
            vectors[:, batch] = self._embed_batch([token_ids[i] for i in batch])
        return vectors

    def _tokenize(self, sentences: list[str]) -> list[list[int]]:
        if not sentences:
            return []
        token_ids: list[list[int]] = self.tokenizer(sentences, verbose=False)["input_ids"]
        too_long = sum(len(ids) > self.max_tokens for ids in token_ids)
        if too_long:
            log.warning(
                "%d of %d sentences have more than %d tokens and were cut", too_long, len(sentences), self.max_tokens
            )
            token_ids = self.tokenizer(sentences, truncation=True, max_length=self.max_tokens)["input_ids"]
        return token_ids

    @torch.inference_mode()
    def _embed_batch(self, token_ids: list[list[int]]) -> Vectors:
        """[L, b, D]; a layer is pooled as it is computed, so that one layer's tokens [b, t, D] are alive at a time."""
        padded = self.tokenizer.pad({"input_ids": token_ids}, return_tensors="pt").to(self.device)
        mask = padded["attention_mask"]
        pooled: dict[int, torch.Tensor] = {}

        def pool_output_of(layer: int) -> Any:
            def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                pooled[layer] = torch.nn.functional.normalize(pool(hidden, mask, self.pooling), dim=-1)

            return hook

        handles = [self._outputs[layer].register_forward_hook(pool_output_of(layer)) for layer in self.layers]
        try:
            self.model(input_ids=padded["input_ids"], attention_mask=mask)
        finally:
            for handle in handles:
                handle.remove()
        vectors: Vectors = torch.stack([pooled[layer] for layer in self.layers]).float().cpu().numpy()
        return vectors


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """[b, t, D], [b, t] -> [b, D]: the first token, or the mean of all real tokens, <s> and </s> among them."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _load(folder: Path) -> tuple[Any, Any]:
    """The encoder (fp32) and tokenizer of a Hugging Face folder."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not there"
        raise UserError(f"model folder {folder} {what}: give one that `infoxlm export` wrote")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        family_of(model.config, f"model folder {folder}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model folder {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    # Without its file an XLM-R tokenizer loads all the same, with nothing but special tokens.
    vocabulary_files = tokenizer.vocab_files_names.values()
    if not any((folder / name).is_file() for name in vocabulary_files):
        raise UserError(f"model folder {folder} has no tokenizer: expected one of {', '.join(vocabulary_files)}")
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
        raise UserError(
            f"model folder {folder} lacks {len(missing)} weights of its encoder, such as {missing[0]}: export it again"
        )
    return model, tokenizer


def _chosen_layers(layers: int | Literal["all"] | None, config: Any, folder: Path) -> list[int]:
    last: int = config.num_hidden_layers
    if layers == "all":
        return list(range(last + 1))
    layer = getattr(config, "universal_layer", last) if layers is None else layers
    if not 0 <= layer <= last:
        raise UserError(f"layer {layer} is out of range: {folder} has layers 0 (embeddings) to {last}")
    return [layer]


def _progress(batches: list[list[int]], description: str) -> Iterable[list[int]]:
    console = Console(stderr=True)
    return track(batches, description, console=console, transient=True, disable=not console.is_terminal)
