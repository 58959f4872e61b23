"""DeepSpeed's checkpoint files: captures them before DeepSpeed writes them, reads them as whole tensors, and converts
them for another number of ranks.

The files are pickles, and unpickling runs code: read only folders that you trust. The package checkpoint/ decides what
is written and when.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import infoxlm_ds.engine.config  # noqa: F401  # tells DeepSpeed the device, before that is imported

# isort: split
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

# The converter needs this at stages 1 and 2: the version of its format, and no keys about tensor parallelism.
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}


class Capture(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed is untyped
    """Replaces DeepSpeed's writer and keeps the states that it would write, by file name."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict[str, Any]] = {}

    def create(self, info: CheckpointCommitInfo) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self.files[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("files are read by DeepSpeed's own engine")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def convert(checkpoint: Path, universal: Path) -> None:
    """Convert `checkpoint`, of ZeRO 1 to 3, to the new folder `universal`: DeepSpeed's universal checkpoint, with one
    file for each parameter, which any number of ranks loads. Needs the host's memory for one rank's shard at a time,
    and disk space for the state twice."""
    with (
        tempfile.TemporaryDirectory() as plain,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        # DeepSpeed uses the path as a regular expression, which fails if it has a + or a $: give it links.
        source, target = Path(plain, "source"), Path(plain, "target")
        source.symlink_to(checkpoint.absolute())
        target.symlink_to(universal.parent.absolute())
        options = Namespace(
            input_folder=str(source),
            output_folder=str(target / universal.name),
            num_extract_workers=1,  # more workers would fork a process that has threads
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        ds_to_universal.main(options)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The module's weights in a checkpoint folder: the fp32 masters, on the CPU.

    DeepSpeed's own reader works for ZeRO 3, but not for the shards of ZeRO 1 with fp32 gradient sums. Below stage 3 we
    join the fragments ourselves.
    """
    if any(checkpoint.glob("zero_pp_rank_*_model_states.pt")):
        whole: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
        return whole
    (states,) = (_unpickle(path) for path in checkpoint.glob("*model_states.pt"))
    weights: dict[str, Tensor] = states["module"]
    shards = sorted(checkpoint.glob("*optim_states.pt"), key=_rank)
    fragments: dict[str, list[Tensor]] = {}
    for shard in map(_unpickle, shards):
        optimizer = shard["optimizer_state_dict"]
        groups = zip(optimizer["param_slice_mappings"], optimizer["single_partition_of_fp32_groups"], strict=True)
        for addresses, values in groups:
            for name, address in addresses.items():
                fragments.setdefault(name, []).append(values[address.start : address.start + address.numel])
    weights |= {name: torch.cat(parts).view_as(weights[name]) for name, parts in fragments.items()}
    for alias, name in (
        states["shared_params"] or {}
    ).items():  # tied weights have one master, under one name; stage 0 lists none
        weights[alias] = weights[name]
    return weights


def _rank(shard: Path) -> int:
    return int(shard.name.split("pp_rank_")[1].split("_")[0])


def _unpickle(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return state
