"""Any cut of the parameters is read back as any other, and every value once."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from infoxlm_ds.checkpoint import fragments
from infoxlm_ds.checkpoint.files import Contents, to_host, write_files, write_tensors
from infoxlm_ds.checkpoint.fragments import Index, Layout, Piece, index_of, pack, read_pieces, to_write
from infoxlm_ds.checkpoint.store import Store, damage_of
from infoxlm_ds.config import UserError

KINDS = ("master", "exp_avg", "exp_avg_sq")
# Shapes of parameters, what each rank wrote of them, and fragments of another cut: parameter, start, number of values.
World = tuple[dict[str, tuple[int, ...]], list[Layout], list[tuple[str, int, int]]]


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int, int, int]]:
    """Fragments of one parameter: start, number of values, rank, file of that rank."""
    inner = draw(st.lists(st.integers(1, max(1, size - 1)), max_size=6, unique=True)) if size > 1 else []
    bounds = [0, *sorted(inner), size]
    owners = st.tuples(st.integers(0, 3), st.integers(0, 2))
    return [(low, high - low, *draw(owners)) for low, high in itertools.pairwise(bounds)]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    shapes = {}
    layouts: list[Layout] = [[] for _ in range(4)]
    wanted = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
        shapes[f"p{number}"] = shape
        for start, size, rank, file in draw(cuts(prod(shape))):
            layouts[rank].append((number, start, size, file))
        wanted += [(f"p{number}", start, size) for start, size, *_ in draw(cuts(prod(shape)))]
    return shapes, layouts, wanted


@given(worlds())
@settings(max_examples=200, deadline=None)
def test_any_cut_is_read_as_any_other(world: World) -> None:
    shapes, layouts, wanted = world
    rng = np.random.default_rng(0)
    values = {name: rng.random(prod(shape)) for name, shape in shapes.items()}
    index = index_of(layouts, shapes, dict.fromkeys(shapes, KINDS), {})
    names = list(shapes)
    stored = {}  # by file and first value, as on the disk
    for rank, layout in enumerate(layouts):
        for number, start, size, file in layout:
            key = f"state-{rank:05d}-{file:02d}.safetensors", names[number], start
            stored[key] = values[names[number]][start : start + size]
    for name, start, size in wanted:
        parts = []
        for file, first, low, high in index.parameters[name].overlaps(start, start + size):
            assert start <= low < high <= start + size
            parts.append(stored[index.files[file], name, first][low - first : high - first])
        assert np.array_equal(np.concatenate(parts), values[name][start : start + size])


@pytest.mark.parametrize(
    "layout", [[(0, 0, 5, 0)], [(0, 0, 4, 0), (0, 3, 3, 0)], [(0, 1, 5, 0)], [], [(0, 0, 3, 0), (0, 4, 2, 0)]]
)
def test_a_gap_or_an_overlap_is_found_when_the_index_is_made(layout: Layout) -> None:
    with pytest.raises(RuntimeError, match="do not cover weight once"):
        index_of([layout], {"weight": (2, 3)}, {"weight": KINDS}, {})


def test_the_written_format_is_safetensors(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(5, 3),
        "part": torch.arange(20.0)[3:11],
        "number": torch.tensor(7),
        "ids": torch.arange(6).view(2, 3),
        "nothing": torch.zeros(0),
        "columns": torch.randn(4, 4).t(),
    }
    buffer = io.BytesIO()
    write_tensors(buffer, tensors, tensors.values())
    loaded = load(buffer.getvalue())
    assert loaded.keys() == tensors.keys()
    for name, x in tensors.items():
        assert torch.equal(loaded[name], x) and loaded[name].dtype == x.dtype
    (receipt,) = write_files(tmp_path, {"x.safetensors": tensors})
    assert (tmp_path / "x.safetensors").read_bytes() == buffer.getvalue()
    assert receipt.sha256 == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert receipt.bytes == len(buffer.getvalue())


def test_a_copy_for_a_thread_does_not_change_with_the_state() -> None:
    x = torch.zeros(3)
    copy = to_host({"a.safetensors": {"x": x}, "state.json": {"step": 3}})
    x += 1
    assert copy["a.safetensors"]["x"].tolist() == [0, 0, 0] and copy["state.json"] == {"step": 3}


def _committed(folder: Path, files: Contents) -> None:
    """Write a checkpoint's files and its manifest."""
    step = Store(folder).begin(1)
    Store(folder).publish(step, write_files(step, files))


def _three_files(folder: Path, index: dict[str, Any] | None = None) -> tuple[Path, Tensor]:
    """A checkpoint of one parameter in three files. Its folder and the parameter."""
    whole = torch.arange(30.0)
    layouts: list[Layout] = [[(0, 10 * i, 10, 0)] for i in range(3)]
    made = index_of(layouts, {"weight": (5, 6)}, {"weight": ("master",)}, {})
    files: Contents = {
        file: {f"master/weight/{10 * i}": whole[10 * i : 10 * i + 10]} for i, file in enumerate(made.files)
    }
    _committed(folder, files | {"index.json": index if index is not None else made.as_json()})
    return folder / "checkpoints" / "step-00000001", whole


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    """Of three files, the second was removed: fragments that do not touch it are still read."""
    folder, whole = _three_files(tmp_path)
    index = Index.read(folder)
    (folder / index.files[1]).unlink()
    for start, size in ((0, 10), (3, 4), (20, 10), (29, 1)):
        piece = Piece("weight", start, {"master": torch.zeros(size)})
        read_pieces(folder, index, [piece])
        assert torch.equal(piece.values["master"], whole[start : start + size])
    with pytest.raises(FileNotFoundError):
        read_pieces(folder, index, [Piece("weight", 5, {"master": torch.zeros(10)})])


WEIGHT: dict[str, Any] = {"shape": [5, 6], "kinds": ["master"], "starts": [0, 10, 20], "files": [0, 1, 2]}
NAMES = [f"state-0000{rank}-00.safetensors" for rank in range(3)]
GOOD: dict[str, Any] = {"parameters": {"weight": WEIGHT}, "files": NAMES, "tied": {}, "dtype": "float32"}
WRONG: list[dict[str, Any]] = [
    {"shape": "ab"},
    {"shape": [5]},
    {"starts": []},
    {"starts": [3, 10, 20]},
    {"starts": [0, 20, 10]},
    {"starts": [0, 10, "x"]},
    {"files": [0, 1, 3]},
    {"files": [0, 1]},
    {"files": [0, -1, 2]},
    {"kinds": 3},
]
HOSTILE: list[dict[str, Any]] = [
    {},
    {key: value for key, value in GOOD.items() if key != "parameters"},
    GOOD | {"dtype": "float16"},
    GOOD | {"files": ["../outside.safetensors", *NAMES[1:]]},
    GOOD | {"files": ["/outside.safetensors", *NAMES[1:]]},
    GOOD | {"files": NAMES[:2]},
    GOOD | {"tied": {"alias": "nothing"}},
    *(GOOD | {"parameters": {"weight": WEIGHT | wrong}} for wrong in WRONG),
]


@pytest.mark.parametrize("index", HOSTILE, ids=range(len(HOSTILE)))
def test_an_index_that_no_rank_writes_is_refused_though_its_hash_is_right(
    tmp_path: Path, index: dict[str, Any]
) -> None:
    assert Index.read(_three_files(tmp_path / "good", GOOD)[0]).as_json() == index_json(GOOD)
    folder, _ = _three_files(tmp_path / "run", index)
    assert damage_of(folder) == ""
    with pytest.raises(UserError, match=r"index\.json differs from what was written"):
        Index.read(folder)


def index_json(tree: dict[str, Any]) -> dict[str, Any]:
    """What `as_json` gives, whose shapes and kinds are tuples until they are written."""
    weight = {key: tuple(x) if key in ("shape", "kinds") else x for key, x in WEIGHT.items()}
    return tree | {"parameters": {"weight": weight}}


@pytest.mark.parametrize("entry", [{}, {"bytes": 3, "sha256": "", "more": 1}, 3, None])
def test_a_manifest_that_no_rank_writes_is_refused_though_its_hash_is_right(tmp_path: Path, entry: object) -> None:
    folder, _ = _three_files(tmp_path)
    files = {"index.json": entry}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, "files": files}))
    assert damage_of(folder) == "manifest.json differs from what was written"


def test_long_fragments_are_cut_and_full_files_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a large model does, with small limits."""
    monkeypatch.setattr(fragments, "LONGEST", 7)
    monkeypatch.setattr(fragments, "FULL", 100)
    monkeypatch.setattr(fragments, "AT_ONCE", 3)
    shapes = {"a": (5, 9), "b": (4,), "c": ()}
    state = {name: {kind: torch.randn(prod(shape)) for kind in KINDS} for name, shape in shapes.items()}
    engine: Any = SimpleNamespace(
        sharded=True, parameters=shapes, state=lambda: ((name, 0, of_one) for name, of_one in state.items())
    )
    tensors, layout = pack(to_write(engine, None), list(shapes))
    assert all(1 <= size <= 7 for _, _, size, _ in layout) and len(tensors) > 3
    assert all(sum(x.nbytes for x in of_file.values()) <= 100 + 3 * 7 * 4 for of_file in tensors.values())
    index = index_of([layout], shapes, dict.fromkeys(shapes, KINDS), {})
    _committed(tmp_path, tensors | {"index.json": index.as_json()})
    folder = tmp_path / "checkpoints" / "step-00000001"
    for name, shape in shapes.items():
        for start in range(0, prod(shape), 4):
            piece = Piece(name, start, {kind: torch.zeros(min(4, prod(shape) - start)) for kind in KINDS})
            read_pieces(folder, Index.read(folder), [piece])
            for kind, x in piece.values.items():
                assert torch.equal(x, state[name][kind][start : start + len(x)])
