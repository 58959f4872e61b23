"""A lane goes to its device in one copy and arrives unchanged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infoxlm_ds.data.batch import BatchBuilder, JointBatch
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.data.upload import in_one_buffer
from tests.corpus import small_recipe

META = torch.device("meta")


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a nest of dataclasses and tuples, by its path, but text ids: they stay on the host."""
    if isinstance(value, Tensor):
        return {name: value}
    parts: dict[Any, Any] = dict(enumerate(value)) if isinstance(value, tuple) else {}
    if dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for on_host in ("text_ids", "hard_ids"):
        parts.pop(on_host, None)
    return {path: x for key, part in parts.items() for path, x in _tensors(part, f"{name}.{key}").items()}


@pytest.fixture(scope="module", params=["contrast.keys=momentum", "contrast.keys=gradient"])
def lane(corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> JointBatch:
    recipe = small_recipe(corpus, tmp_path_factory.mktemp("lane") / "run", request.param)
    return BatchBuilder(recipe, Corpus(corpus), [0, 1, 2, 3]).build(1, 3)


def test_one_buffer_holds_the_same_tensors(lane: JointBatch) -> None:
    before, after = _tensors(lane), _tensors(in_one_buffer(lane, pinned=False))
    assert before.keys() == after.keys() and len(before) > 15
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert len({x.untyped_storage().data_ptr() for x in after.values()}) == 1


class _Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[bool] = []  # whether each copy blocks the host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META:
            self.seen.append(not kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


def test_a_lane_is_uploaded_by_one_copy_that_does_not_hold_up_the_host(lane: JointBatch) -> None:
    with _Copies() as copies:
        uploaded = in_one_buffer(lane, pinned=False).to(META)
    assert copies.seen == [False]
    there = _tensors(uploaded)
    for name, x in _tensors(lane).items():
        assert there[name].device == META and there[name].shape == x.shape and there[name].dtype == x.dtype, name
    assert uploaded.names == lane.names and uploaded.sides == lane.sides
    assert torch.equal(uploaded.text_ids, lane.text_ids) and torch.equal(uploaded.hard_ids, lane.hard_ids)


def test_a_lane_for_varlen_attention_has_no_dense_groups(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run")
    dense, varlen = (BatchBuilder(recipe, Corpus(corpus), [0], dense=dense).build(0, 0) for dense in (True, False))
    groups = {name for name in _tensors(dense) if ".dense." in name}
    assert groups and _tensors(varlen).keys() == _tensors(dense).keys() - groups
    assert not any(".queries.dense" in name for name in groups)  # no pass reads them
