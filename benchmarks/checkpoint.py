"""What a checkpoint costs, with one state on one disk: ours, DeepSpeed's own, and torch.distributed.checkpoint.
`python -m benchmarks.checkpoint --folder FOLDER`, on the disk that is to be measured

Two ranks at ZeRO 1 in fp32 hold a model of 6 layers of width 384 with trained keys: masters and Adam's moments, no
queue. A save is *blocked* while training would stand still, and *committed* when its files are on the disk. Ours hashes
its files and reads them back; `without hashes` is the same without both. DeepSpeed does not wait for the disk;
`committed` has the same wait as for the others. torch's has the flat groups of parameters as DTensors. A load ends when
the weights that compute are set, which takes a gather over ranks. *other* loads on one rank; for DeepSpeed that
includes the conversion to a universal checkpoint. Memory is the peak of a rank's own (anonymous) memory in MiB, above
that before the call. Ways take turns, and the median counts; files are in the page cache when they are read.

Then it calculates, without a cluster, the index of XLM-R XL on 1,024 ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.checkpoint import ds_to_universal
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForMaskedLM, XLMRobertaXLConfig

from benchmarks.cases import STRONG, Case, SpreadCorpus
from benchmarks.processes import Group
from infoxlm_ds import dist
from infoxlm_ds.atomic import sync
from infoxlm_ds.build import build, check_inputs
from infoxlm_ds.checkpoint.files import write_files
from infoxlm_ds.checkpoint.fragments import LONGEST, Index, Layout, index_of
from infoxlm_ds.checkpoint.store import INDEX, Receipt, Store
from infoxlm_ds.engine.ranks import start_ranks

WAYS = ("ours", "ours, without hashes", "ours, asynchronous", "DeepSpeed", "torch", "torch, asynchronous")
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}  # what the converter asks for


class Memory:
    """The peak of this process' anonymous memory within a block, in MiB above that before."""

    def __enter__(self) -> Memory:
        self._before, self.peak, self._done = self._now(), 0.0, False
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._watch.join()

    def _look(self) -> None:
        while not self._done:
            self.peak = max(self.peak, self._now() - self._before)
            time.sleep(0.002)

    @staticmethod
    def _now() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


class Run:
    """A rank with the state, which is saved and loaded in one of WAYS."""

    def __init__(self, case: Case, way: str, folder: Path, rank: int, world: int) -> None:
        start_ranks()
        self._way, self._folder, recipe = way, folder, case.recipe()
        settings = recipe.checkpoint.model_copy(update={"asynchronous": "asynchronous" in way})
        (folder / "model").mkdir(parents=True, exist_ok=True)
        with self._hashes():
            inputs = check_inputs(recipe.model_copy(update={"run": folder, "checkpoint": settings}), rank, world)
        self._inputs = replace(inputs, corpus=SpreadCorpus(recipe.corpus, case.vocabulary))
        with patch.object(inputs.checkpoints, "find", lambda identity: None):  # `load` is measured apart
            self._state = build(self._inputs)
        torch.manual_seed(rank)
        for _, _, values in self._state.engine.state():
            for x in values.values():
                x.uniform_()

    def save(self) -> dict[str, float]:
        with Memory() as memory, self._hashes():
            dist.barrier()
            start = time.monotonic()
            finish = self._start()
            blocked = time.monotonic() - start
            finish()
            dist.barrier()
            committed = time.monotonic() - start
        files = [p for p in self._folder.rglob("*") if p.is_file() and p.parent.name != "model"]
        return {
            "blocked": blocked,
            "committed": committed,
            "MB": sum(p.stat().st_size for p in files) / 1e6,
            "memory": memory.peak,
        }

    def _start(self) -> Callable[[], object]:
        """Begin a save. The result ends it."""
        if self._way.startswith("ours"):
            self._state.step += 1
            s, checkpoints = self._state, self._state.checkpoints
            checkpoints.save(s.saved(), s.identity, s.engine, s.momentum, s.queue)
            if "asynchronous" not in self._way:
                checkpoints.finish()
            return checkpoints.finish
        shutil.rmtree(self._folder / "peer", ignore_errors=True) if dist.rank() == 0 else None
        dist.barrier()
        target = self._folder / "peer"
        if self._way == "DeepSpeed":
            self._engine.save_checkpoint(str(self._folder), "peer", client_state=UNIVERSAL, save_latest=False)
            return partial(_to_disk, sorted(target.glob(f"*rank_{dist.rank()}*")))
        if self._way == "torch":
            save(self._tensors(), checkpoint_id=target)
            return lambda: None
        future: Any = async_save(self._tensors(), checkpoint_id=target)
        return partial(future.result)

    def load(self) -> dict[str, float]:
        with Memory() as memory, self._hashes():
            dist.barrier()
            start = time.monotonic()
            if self._way.startswith("ours"):
                s, checkpoints = self._state, self._state.checkpoints
                found = checkpoints.find(self._inputs.identity)
                assert found is not None
                checkpoints.load(found, s.engine, s.momentum, s.queue)
            elif self._way == "DeepSpeed":
                self._load_deepspeed()
            else:
                load(self._tensors(), checkpoint_id=self._folder / "peer")
                self._engine.optimizer.update_lp_params()
            dist.barrier()
            return {"load": time.monotonic() - start, "load memory": memory.peak}

    def _load_deepspeed(self) -> None:
        universal = dist.world_size() == 1
        if universal:
            _convert(self._folder / "peer", self._folder / "universal")
        self._engine._config.load_universal_checkpoint = universal
        self._engine.load_checkpoint(str(self._folder), tag="universal" if universal else "peer")

    @property
    def _engine(self) -> Any:
        return self._state.engine._engine  # DeepSpeed's own

    def _tensors(self) -> dict[str, Any]:
        """The flat groups, as torch's checkpoints know them."""
        mesh, adamw = init_device_mesh("cpu", (dist.world_size(),)), self._state.engine.optimizer
        out: dict[str, Any] = {}
        for i, group in enumerate(adamw.param_groups):
            (master,) = group["params"]
            for kind, x in {"master": master, **adamw.state[master]}.items():
                out[f"{i}/{kind}"] = DTensor.from_local(x.detach(), mesh, [Shard(0)]) if x.ndim else x
        return out

    @contextlib.contextmanager
    def _hashes(self) -> Iterator[None]:
        if "without" not in self._way:
            yield
            return
        nothing = Namespace(update=lambda data: None, hexdigest=lambda: "")
        with (
            patch("infoxlm_ds.checkpoint.files.hashlib", Namespace(sha256=lambda: nothing)),
            patch("infoxlm_ds.checkpoint.store.Receipt.damage", lambda receipt, folder: ""),
        ):
            yield


def _to_disk(files: list[Path]) -> None:
    for path in files:
        sync(path)


def _convert(checkpoint: Path, universal: Path) -> None:
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint), "output_folder": str(universal), "inject_missing_state": False}
    ds_to_universal.main(Namespace(**options, **folders))


def measure(case: Case, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, by way and figure."""
    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            place = Path(tempfile.mkdtemp(dir=folder))
            with Group() as group:
                ranks = group.start(partial(Run, case, way, place), 2)
                saved, loaded = ([a.value for a in ranks(method)] for method in ("save", "load"))
            with Group() as group:
                alone = [a.value for a in group.start(partial(Run, case, way, place), 1)("load")]
            for answers, suffix in ((saved, ""), (loaded, ""), (alone, ", other")):
                for name in answers[0]:
                    found[way][name + suffix].append(max(answer[name] for answer in answers))
            shutil.rmtree(place)
    return {way: {name: statistics.median(x) for name, x in of_way.items()} for way, of_way in found.items()}


def simulate(world: int, stage: int, then: int) -> str:
    """The index of XLM-R XL as `world` ranks would write it at a ZeRO stage: its size, files, and what a rank has to
    read when it comes back on half of the ranks at the stage `then`."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(XLMRobertaXLConfig())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    kinds: dict[str, tuple[str, ...]] = dict.fromkeys(shapes, ("master", "exp_avg", "exp_avg_sq", "average"))
    start = time.process_time()
    index = index_of(_layouts(shapes, world, stage), shapes, kinds, {})
    built = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        step = store.begin(1)
        receipts = write_files(step, {INDEX: index.as_json()})
        path = store.publish(step, [*receipts, *(Receipt(name, 0, "") for name in index.files)]) / INDEX
        start = time.process_time()
        read = Index.read(path.parent)
        parsed = time.process_time() - start
        fewer = _layouts(shapes, world // 2, then)
        names, opened, planned = list(shapes), [], []
        for layout in (fewer[0], fewer[len(fewer) // 2], fewer[-1]):
            begun = time.process_time()
            needed = set()
            for number, first, size, _ in layout:
                needed |= {file for file, *_ in read.parameters[names[number]].overlaps(first, first + size)}
            planned.append(time.process_time() - begun)
            opened.append(len(needed))
        size = path.stat().st_size
    cells = stage, then, f"{size / 1e6:.1f}", len(index.files), built, parsed, max(planned), max(opened)
    return "| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells) + " |"


def _layouts(shapes: dict[str, tuple[int, ...]], world: int, stage: int) -> list[Layout]:
    layouts: list[Layout] = [[] for _ in range(world)]
    if stage == 3:
        for number, shape in enumerate(shapes.values()):
            part = ceil(prod(shape) / world)
            for rank in range(ceil(prod(shape) / part)):
                layouts[rank].append((number, rank * part, min(part, prod(shape) - rank * part), 0))
        return layouts
    for vectors in (False, True):  # two groups of parameters, each cut into equal parts
        group = [(i, prod(shape)) for i, shape in enumerate(shapes.values()) if (len(shape) < 2) == vectors]
        part, at = ceil(sum(size for _, size in group) / world), 0
        for number, size in group:
            first = 0
            while first < size:
                rank, used = divmod(at, part)
                step = min(size - first, part - used, LONGEST)
                layouts[rank].append((number, first, step, 0))
                first, at = first + step, at + step
    return layouts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is to be measured")
    options = parser.parse_args()
    case = Case(layers=options.layers, universal_layer=1, vocabulary=options.vocabulary, lanes=2, contrast=dict(STRONG))
    os.environ["HF_HUB_OFFLINE"] = "1"
    case.recipe()  # makes the corpus
    figures = measure(case, options.folder.absolute(), options.rounds)
    columns = ("blocked", "committed", "MB", "memory", "load", "load memory", "load, other", "load memory, other")
    print("| |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for way, of_way in figures.items():
        print(f"| {way} |", " | ".join(f"{of_way[c]:.3g}" for c in columns), "|")
    print("\nXLM-R XL on 1,024 ranks, calculated")
    print("| ZeRO | then | index, MB | files | s to make it | s to read it | s to plan, 512 ranks | files opened |")
    print("|---|---|---|---|---|---|---|---|")
    for stage, then in ((1, 1), (3, 3), (3, 1), (1, 3)):
        print(simulate(1024, stage, then), flush=True)


if __name__ == "__main__":
    main()
