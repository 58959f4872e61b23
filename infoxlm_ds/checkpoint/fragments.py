"""The state of all parameters as fragments in safetensors files, and the index by which a rank finds those it needs.

A fragment is a run of values of one flattened parameter. It has one tensor of each of the parameter's kinds: `master`,
`exp_avg` and `exp_avg_sq` (Adam's moments) and, where the key encoder follows the parameter, `average`. Each is in fp32
and is named `kind/parameter/start`. Every rank writes what it owns; the fragments of a parameter cover it without a
gap. So a rank that is to hold other fragments reads those that overlap its own, from their files.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from infoxlm_ds import dist
from infoxlm_ds.checkpoint.files import Contents
from infoxlm_ds.checkpoint.store import INDEX, changed, read_json, read_receipts
from infoxlm_ds.engine.engine import MOMENTS, Engine
from infoxlm_ds.model.momentum import MomentumEncoder

LONGEST = 2**24  # values of a fragment on the disk
AT_ONCE = 2**20  # values that a reader holds beside its own
FULL = 2**30  # bytes of a file, after which a rank begins the next

Layout = list[tuple[int, int, int, int]]  # parameter's number, start, number of values, number of the rank's file


@dataclass(frozen=True)
class Piece:
    """A fragment in memory: of each kind, values [n] that begin at `start` of the flattened parameter."""

    parameter: str
    start: int
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def part(self, low: int, high: int) -> Piece:
        """Values number `low` to `high` of this piece."""
        return Piece(self.parameter, self.start + low, {kind: x[low:high] for kind, x in self.values.items()})


@dataclass(frozen=True)
class Stored:
    """How a parameter lies in the files: fragment i begins at `starts[i]` and is in `files[i]`, by its number."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    starts: list[int]
    files: list[int]

    def sound(self, files: int) -> bool:
        """Whether the fragments follow each other and are in files that exist."""
        rising = [0, *self.starts[1:], prod(self.shape)]
        return (
            len(self.files) == len(self.starts) > 0 == self.starts[0]
            and all(low < high for low, high in itertools.pairwise(rising))
            and all(0 <= file < files for file in self.files)
        )

    def overlaps(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Of the fragments that hold values `start` to `end`: the file, where the fragment begins, and from where to
        where it is needed, in values of the parameter."""
        for i in range(int(np.searchsorted(self.starts, start, "right")) - 1, len(self.starts)):
            first = self.starts[i]
            if first >= end:
                return
            last = self.starts[i + 1] if i + 1 < len(self.starts) else prod(self.shape)
            yield self.files[i], first, max(start, first), min(end, last)


@dataclass(frozen=True)
class Index:
    """All fragments of a checkpoint. `tied`: other names of parameters, and the names under which they are stored."""

    parameters: dict[str, Stored]
    files: list[str]
    tied: dict[str, str]
    dtype: Literal["float32"] = "float32"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a committed folder. UserError if it is missing, or if it is not what a rank writes."""
        written = {receipt.name for receipt in read_receipts(folder)}
        try:
            index = TypeAdapter(cls).validate_python(read_json(folder / INDEX))
        except ValidationError:
            raise changed(folder, INDEX) from None
        stored = index.parameters.values()
        if not {INDEX, *index.files} <= written or not all(of_one.sound(len(index.files)) for of_one in stored):
            raise changed(folder, INDEX)
        if not all(name in index.parameters for name in index.tied.values()):
            raise changed(folder, INDEX)
        return index

    def difference(self, engine: Engine, momentum: MomentumEncoder | None) -> str:
        """How a model differs from the one that was saved; empty if it has the same parameters."""
        now = {name: (shape, kinds) for name, shape, kinds in _parameters(engine, momentum)}
        then = {name: (of_one.shape, of_one.kinds) for name, of_one in self.parameters.items()}
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                return f"{name} was {_told(then.get(name))} and is {_told(now.get(name))}"
        return "" if self.tied == engine.tied else "other parameters are tied"


def pieces_of(engine: Engine, momentum: MomentumEncoder | None) -> Iterator[Piece]:
    """This rank's state, as the memory itself. Every rank has all of it if the engine is not sharded."""
    averages = {}
    if momentum is not None:
        names = {id(p): name for name, p in engine.parameters.items()}
        averages = {(names[id(momentum.source[f.parameter])], f.start): f.values for f in momentum.shadow}
    for name, start, values in engine.state():
        average = averages.get((name, start))
        yield Piece(name, start, values if average is None else values | {"average": average})


def to_write(engine: Engine, momentum: MomentumEncoder | None) -> Iterator[Piece]:
    """The pieces that this rank writes: each value is written by one rank, none is longer than LONGEST."""
    share, rank = (1, 0) if engine.sharded else (dist.world_size(), dist.rank())
    for piece in pieces_of(engine, momentum):
        own = piece.part(len(piece) * rank // share, len(piece) * (rank + 1) // share)
        for low in range(0, len(own), LONGEST):
            yield own.part(low, low + LONGEST)


def pack(pieces: Iterable[Piece], names: Sequence[str]) -> tuple[Contents, Layout]:
    """Distribute pieces over this rank's files. Returns the tensors of each file, and what lies where."""
    files: list[dict[str, Tensor]] = []
    layout: Layout = []
    number, room = {name: i for i, name in enumerate(names)}, 0
    for piece in pieces:
        if room <= 0:
            files.append({})
            room = FULL
        files[-1] |= {f"{kind}/{piece.parameter}/{piece.start}": x for kind, x in piece.values.items()}
        layout.append((number[piece.parameter], piece.start, len(piece), len(files) - 1))
        room -= sum(x.nbytes for x in piece.values.values())
    return {file_name(dist.rank(), i): tensors for i, tensors in enumerate(files)}, layout


def file_name(rank: int, number: int) -> str:
    """The name of file number `number` of a rank."""
    return f"state-{rank:05d}-{number:02d}.safetensors"


def build_index(layouts: Sequence[Layout], engine: Engine, momentum: MomentumEncoder | None) -> Index:
    """The index of what all ranks write. RuntimeError if a parameter is not covered."""
    kinds = {name: of_one for name, _, of_one in _parameters(engine, momentum)}
    return index_of(layouts, engine.shapes, kinds, engine.tied)


def _parameters(
    engine: Engine, momentum: MomentumEncoder | None
) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Name, shape and kinds of each parameter."""
    followed = {id(p) for p in momentum.source} if momentum is not None else set()
    for name, p in engine.parameters.items():
        yield name, engine.shapes[name], ("master", *MOMENTS, *("average",) * (id(p) in followed))


def _told(parameter: tuple[tuple[int, ...], tuple[str, ...]] | None) -> str:
    return "not there" if parameter is None else f"{list(parameter[0])} with {', '.join(parameter[1])}"


def index_of(
    layouts: Sequence[Layout],
    shapes: dict[str, tuple[int, ...]],
    kinds: dict[str, tuple[str, ...]],
    tied: dict[str, str],
) -> Index:
    """`build_index` of plain values. The layouts are in the order of the ranks."""
    counts = [1 + max((file for *_, file in layout), default=-1) for layout in layouts]
    files = [file_name(rank, i) for rank, count in enumerate(counts) for i in range(count)]
    before = np.cumsum([0, *counts])
    rows = [np.array(layout, np.int64).reshape(-1, 4) for layout in layouts]
    for of_rank, first in zip(rows, before[:-1], strict=True):
        of_rank[:, 3] += first
    everything = np.concatenate(rows)
    everything = everything[np.lexsort((everything[:, 1], everything[:, 0]))]
    bounds = np.searchsorted(everything[:, 0], np.arange(len(shapes) + 1))
    stored = {}
    for number, (name, shape) in enumerate(shapes.items()):
        _, starts, sizes, places = everything[bounds[number] : bounds[number + 1]].T
        if [0, *(starts + sizes).tolist()] != [*starts.tolist(), prod(shape)]:
            raise RuntimeError(f"the ranks' fragments do not cover {name} once")
        stored[name] = Stored(shape, kinds[name], starts.tolist(), places.tolist())
    return Index(stored, files, tied)


def read_pieces(folder: Path, index: Index, pieces: Iterable[Piece]) -> None:
    """Fill pieces with what a checkpoint holds. Opens each file that is needed once, and reads nothing else of it. The
    pieces must lie within the parameters. SafetensorError if a file is not what the index says."""
    needed: dict[int, list[tuple[Piece, int, int, int]]] = defaultdict(list)
    for piece in pieces:
        for file, first, low, high in index.parameters[piece.parameter].overlaps(piece.start, piece.start + len(piece)):
            needed[file].append((piece, first, low, high))
    for file, reads in sorted(needed.items()):
        with safe_open(folder / index.files[file], "pt") as stored:
            for piece, first, low, high in reads:
                for kind, values in piece.values.items():
                    fragment = stored.get_slice(f"{kind}/{piece.parameter}/{first}")
                    for at in range(low, high, AT_ONCE):
                        end = min(at + AT_ONCE, high)
                        values[at - piece.start : end - piece.start] = fragment[at - first : end - first]
