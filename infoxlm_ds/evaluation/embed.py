"""Sentence vectors, during training and from a model folder in Hugging Face format.

Legend: n sentences, b sentences of one batch, T tokens, D width, L layers asked for. Layers are numbered as in Hugging
Face's `hidden_states`: 0 is the embeddings, i is the output of the i-th layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from infoxlm_ds import dist
from infoxlm_ds.config import Pooling, UserError
from infoxlm_ds.data.flat_batch import FlatBatch, flat_batch
from infoxlm_ds.data.upload import to_device
from infoxlm_ds.evaluation.neighbours import Vectors
from infoxlm_ds.model.attention import FLAT_ATTENTION, why_not_varlen
from infoxlm_ds.model.checksums import CHANGED, check_checksums
from infoxlm_ds.model.encoder import Body
from infoxlm_ds.model.families import family_of, positions_of
from infoxlm_ds.model.loading import loading
from infoxlm_ds.model.sentence_vector import chosen_views, pooled, read_projection

BATCH = 128  # sentences

log = logging.getLogger(__name__)


def embed(
    sentences: list[str],
    tokenizer: Any,
    positions: int,
    encode: Callable[[FlatBatch], Tensor],
    device: torch.device,
    dense: bool = True,
    description: str = "",
    shared: bool = False,
    quiet: bool = False,
) -> Vectors:
    """L2-normalised vectors of sentences, in their order. `encode` maps a batch to [b, D] or [b, L, D], and the result
    is [n, D] or [n, L, D].

    `positions`: the longest sequence that the encoder takes. Sentences with more tokens than that, or than the
    tokenizer allows, are cut, with a warning. `dense`: attention runs in dense groups. `description`: text of a
    progress bar, shown on a terminal. `shared`: the ranks take batches of the same sentences in turn, and all ranks get
    the result (collective); otherwise this process embeds alone. `quiet`: no warning.
    """
    token_ids = _tokenize(sentences, tokenizer, min(tokenizer.model_max_length, positions), quiet)
    by_length = sorted(range(len(sentences)), key=lambda i: len(token_ids[i]), reverse=True)
    batches = [by_length[start : start + BATCH] for start in range(0, len(by_length), BATCH)]
    rank, world = (dist.rank(), dist.world_size()) if shared else (0, 1)
    parts = []
    turns = [batches[first : first + world] for first in range(0, len(batches), world)]
    for turn in _progress(turns, description):
        # ZeRO 3 needs a call of every rank in every turn. A rank that has no batch repeats the turn's first one.
        batch = [token_ids[i] for i in turn[rank if rank < len(turn) else 0]]
        flat = flat_batch(np.concatenate(batch), np.array([len(ids) for ids in batch]), dense)
        vectors = normalize(encode(to_device(flat, device)).float(), dim=-1)
        if shared:
            counts = [len(of_rank) for of_rank in turn] + [0] * (world - len(turn))
            vectors = dist.gather_rows(vectors[: counts[rank]], counts)
        parts.append(vectors.cpu())
    in_order = np.argsort(by_length)
    result: Vectors = torch.cat(parts).numpy()[in_order] if parts else np.zeros((0, 0), np.float32)
    return result


def _tokenize(sentences: list[str], tokenizer: Any, longest: int, quiet: bool) -> list[list[int]]:
    if not sentences:
        return []
    token_ids: list[list[int]] = tokenizer(sentences, verbose=False)["input_ids"]
    too_long = sum(len(ids) > longest for ids in token_ids)
    if too_long:
        if dist.rank() == 0 and not quiet:
            log.warning("%d of %d sentences have more than %d tokens and were cut", too_long, len(sentences), longest)
        token_ids = tokenizer(sentences, truncation=True, max_length=longest)["input_ids"]
    return token_ids


class SentenceEmbedder:
    """A model and its tokenizer, ready to embed, on the GPU if there is one.

    `layers` and `pooling`: None means the folder's own sentence vector, see `model/sentence_vector.py`; otherwise the
    plain states of one layer, or of "all", by one pooling or by "both". `views`: what is embedded. `device`: as torch
    names it. `half`: a GPU computes in bf16, not in fp32. UserError if the folder has no model or no tokenizer, if
    weights of the encoder are missing, if a layer is out of range, or if there is no such device.
    """

    def __init__(
        self,
        folder: Path,
        layers: int | Literal["all"] | None = None,
        pooling: Pooling | Literal["both"] | None = None,
        device: str | None = None,
        half: bool = False,
    ) -> None:
        self.device = device_of(device)
        model, self.tokenizer = load_folder(folder)
        self.views, self.projected = chosen_views(model.config, layers, pooling, str(folder))
        self._positions = positions_of(model.config)
        dtype = torch.bfloat16 if half and self.device.type == "cuda" else torch.float32
        self._projection = read_projection(folder).to(self.device, dtype) if self.projected else None
        self._body = Body(model.to(self.device, dtype).eval(), self.views[-1].layer)
        self._dense = why_not_varlen(self.device, dtype, self._body.head_width) is not None
        self.width: int = model.config.hidden_size

    def embed(self, sentences: list[str], *, description: str = "embedding", quiet: bool = False) -> Vectors:
        """L2-normalised vectors [V, n, D] of the V views, in the order of `sentences`. On a terminal, a progress bar
        shows `description`. `quiet`: no warning of texts that are cut."""
        if not sentences:
            return np.zeros((len(self.views), 0, self.width), np.float32)
        vectors = embed(
            sentences,
            self.tokenizer,
            self._positions,
            self._pooled,
            self.device,
            dense=self._dense,
            description=description,
            quiet=quiet,
        )
        return np.ascontiguousarray(vectors.swapaxes(0, 1))

    @torch.inference_mode()
    def _pooled(self, batch: FlatBatch) -> Tensor:
        return pooled(self._body, batch, self.views, self._projection)


def device_of(name: str | None) -> torch.device:
    """The device of a name; None: a GPU if there is one. UserError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each kind of device has its own
        reason = str(error).splitlines()[0] if str(error) else "it cannot be used"
        raise UserError(f"device {name}: {reason}: give cpu, cuda or cuda:N") from None
    return device


def load_folder(
    folder: Path, kind: Any = AutoModel, fresh: tuple[str, ...] = ("pooler.",), **options: Any
) -> tuple[Any, Any]:
    """The model (fp32) and tokenizer of a Hugging Face folder. UserError if it has none, or lacks weights.

    `kind`: a class of transformers' auto models; `fresh`: weights with this in their name may be missing, and start at
    random; `options`: of the model's configuration.
    """
    if not (folder / "config.json").is_file():
        problem = "has no config.json" if folder.is_dir() else "is not there"
        raise UserError(f"model folder {folder} {problem}: give one that `infoxlm export` wrote")
    check_checksums(folder, CHANGED)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with loading(f"model folder {folder} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model, report = kind.from_pretrained(
            folder,
            trust_remote_code=False,
            attn_implementation=FLAT_ATTENTION,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        family_of(model.config, f"model folder {folder}")
    # An XLM-R tokenizer loads even without its file. It then has only special tokens.
    vocabulary_files = tokenizer.vocab_files_names.values()
    if not any((folder / name).is_file() for name in vocabulary_files):
        raise UserError(f"model folder {folder} has no tokenizer: expected one of {', '.join(vocabulary_files)}")
    if (largest := max(tokenizer.get_vocab().values())) >= model.config.vocab_size:
        raise UserError(
            f"model folder {folder}: its tokenizer gives ids up to {largest}, but the model has "
            f"{model.config.vocab_size} pieces: copy the tokenizer of this model there"
        )
    if missing := sorted(name for name in report["missing_keys"] if not any(x in name for x in fresh)):
        raise UserError(
            f"model folder {folder} lacks {len(missing)} weights of its encoder, such as {missing[0]}: export it again"
        )
    return model, tokenizer


def _progress(turns: list[list[list[int]]], description: str) -> Iterable[list[list[int]]]:
    console = Console(stderr=True)
    hidden = not description or not console.is_terminal
    return track(turns, description, console=console, transient=True, disable=hidden)
