"""Any cut of the parameters is read back as any other, and every value once."""

from __future__ import annotations

import hashlib
import io
import itertools
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from infoxlm_ds.checkpoint.files import to_host, write_files, write_tensors
from infoxlm_ds.checkpoint.fragments import Index, Layout, Piece, index_of, read_pieces

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


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    """Of three files, the second was removed: fragments that do not touch it are still read."""
    whole = torch.arange(30.0)
    layouts: list[Layout] = [[(0, 10 * i, 10, 0)] for i in range(3)]
    index = index_of(layouts, {"weight": (5, 6)}, {"weight": ("master",)}, {})
    for i, file in enumerate(index.files):
        write_files(tmp_path, {file: {f"master/weight/{10 * i}": whole[10 * i : 10 * i + 10]}})
    write_files(tmp_path, {"index.json": index.as_json()})
    (tmp_path / index.files[1]).unlink()
    index = Index.read(tmp_path)
    for start, size in ((0, 10), (3, 4), (20, 10), (29, 1)):
        piece = Piece("weight", start, {"master": torch.zeros(size)})
        read_pieces(tmp_path, index, [piece])
        assert torch.equal(piece.values["master"], whole[start : start + size])
    with pytest.raises(FileNotFoundError):
        read_pieces(tmp_path, index, [Piece("weight", 5, {"master": torch.zeros(10)})])
