"""The key encoder is the fp32 average of the fp32 master weights, in every precision and stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Constant, Contrast, Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.model.momentum import Fragment, MomentumEncoder, WriteWhole, momentum_at
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import train_step
from tests.corpus import ROOT, small_recipe
from tests.distributed.masters import whole, whole_masters
from tests.distributed.ranks import run_ranks

SMALL = (
    "batch={lanes: 2, mmlm_tokens: 20, tlm_tokens: 0, xlco_pairs: 2}",
    "contrast.queue.size=8",
    "model.width=16",
    "model.layers=1",
)
LONG = 1000


def _start(recipe: Recipe) -> TrainState:
    start_ranks()
    return build(agreed_inputs(recipe))


def _against_an_oracle(rank: int, world: int, recipe: Recipe, steps: int) -> tuple[float, float, list[float]]:
    """After so many applied steps: the largest distance of this average, put together from all ranks, to one taken of
    whole tensors; how far it moved; and the reported shares of weights that changed."""
    state = _start(recipe)
    momentum = state.momentum
    assert momentum is not None
    query, key = (list(m.parameters()) for m in (state.objective.model.sentence_encoder(), momentum.encoder))
    oracle = whole_masters(state.engine, query)
    start, changed = [x.clone() for x in oracle], []
    while state.step < steps:
        if not train_step(state):
            continue
        rate = 1 - momentum_at(recipe.contrast.momentum, state.step)
        masters = whole_masters(state.engine, query)
        oracle = [average.lerp(master, rate) for average, master in zip(oracle, masters, strict=True)]
        if "momentum/changed_share" in state.observed:
            changed.append(state.observed.pop("momentum/changed_share"))
    ours = whole(momentum.shadow, query, state.engine.sharded)
    with deepspeed.zero.GatheredParameters(key):
        for average, parameter in zip(ours, key, strict=True):
            assert torch.equal(parameter, average.to(parameter.dtype))  # what it computes with is rounded once
    return _largest(ours, oracle), _largest(ours, start), changed


def _largest(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1_bf16", "zero3_bf16", "zero2_fp16"])
def test_slow_momentum_in_16_bits_equals_an_unsharded_average(
    corpus: Path, tmp_path: Path, fp16_on_cpu: None, config: str
) -> None:
    engine = f"engine={ROOT / 'ds_configs' / config}.json"
    steps = ("optimizer.steps=51", "contrast.momentum=0.9999", "log.every=25", "log.geometry=5000")
    recipe = small_recipe(corpus, tmp_path / "run", engine, *SMALL, *steps)
    for distance, moved, changed in run_ranks(_against_an_oracle, 2, recipe, 50):
        assert distance < 1e-7 and moved > 1e-4
        assert len(changed) == 2 and all(0 < share < 1 for share in changed)


SHAPES = ((7, 5), (5,), (3, 11))


class _Parameters(nn.Module):
    def __init__(self, values: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.all = nn.ParameterList(value.to(dtype) for value in values)


def _a_thousand_steps(rank: int, world: int, dtype: torch.dtype) -> tuple[float, float, bool]:
    """Each rank averages its half of masters that drift: how far the average is from one in float64, how far that
    moved, and whether each weight to compute with is the average, rounded once."""
    start_ranks()
    noise = torch.Generator().manual_seed(1)
    masters = [torch.randn(shape, generator=noise) for shape in SHAPES]
    drift = [1e-3 * torch.randn(shape, generator=noise) for shape in SHAPES]

    def halves(parameters: object) -> list[Fragment]:
        cut = [(x.numel() // 2 * rank, x.numel() if rank else x.numel() // 2) for x in masters]
        flat = [x.flatten() for x in masters]
        return [Fragment(i, start, flat[i][start:end]) for i, (start, end) in enumerate(cut)]

    source, encoder = _Parameters(masters, dtype), _Parameters(masters, dtype)
    write = partial(WriteWhole, sharded=True)
    constant = Constant(schedule="constant", value=0.9999)
    momentum = MomentumEncoder(source, encoder, halves, write, constant)  # type: ignore[arg-type]
    start = [x.double() for x in masters]
    oracle = start
    for step in range(1, LONG + 1):
        masters = [x + d * torch.randn((), generator=noise) + d for x, d in zip(masters, drift, strict=True)]
        momentum.update(step)
        oracle = [0.9999 * average + 0.0001 * x.double() for average, x in zip(oracle, masters, strict=True)]
    ours = whole(momentum.shadow, list(encoder.all), sharded=True)
    rounded = all(torch.equal(p, x.to(dtype)) for p, x in zip(encoder.all, ours, strict=True))
    return _largest(ours, oracle), _largest(oracle, start), rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_thousand_steps_at_slow_momentum_equal_an_unsharded_average(dtype: torch.dtype) -> None:
    """In 16 bits such an average would stand still."""
    for distance, moved, rounded in run_ranks(_a_thousand_steps, 2, dtype):
        assert distance < 1e-5 and moved > 0.05 and rounded


@pytest.mark.parametrize("config", ["zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32"])
def test_schedules_reach_the_average(corpus: Path, tmp_path: Path, config: str) -> None:
    engine = f"engine={ROOT / 'ds_configs' / config}.json"
    schedule = "contrast.momentum={schedule: constant_with_refresh, value: 0.9, every: 3}"
    recipe = small_recipe(corpus, tmp_path / "run", engine, *SMALL, schedule, "optimizer.steps=9", "log.every=1")
    for distance, moved, changed in run_ranks(_against_an_oracle, 2, recipe, 5):
        assert distance < 1e-6 < moved
        assert all(share > 0.5 for share in changed)  # all but the rows of words that no text had


def test_what_is_logged_of_the_average_is_computed_where_its_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which mixes with no other: a GPU's scalars and the host's do not mix either."""
    from infoxlm_ds import dist

    with torch.device("meta"):
        weights = [torch.nn.Parameter(torch.zeros(3))]
        encoder = torch.nn.Linear(1, 3, bias=False)
    devices = []

    def summed(sums: Tensor) -> Tensor:
        devices.append(sums.device.type)
        return torch.tensor([1.0, 2.0, 1.0, 4.0])

    monkeypatch.setattr(dist, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(dist, "sum_over_ranks", summed)
    source: Any = torch.nn.ParameterList(weights)
    masters = [Fragment(0, 0, torch.zeros(3, device="meta"))]
    schedule = Contrast.model_validate({"temperature": 1.0, "momentum": 0.5}).momentum
    momentum = MomentumEncoder(source, cast(Any, encoder), lambda _: masters, lambda *_: lambda: None, schedule)
    assert momentum.follow(1) == {"momentum/changed_share": 0.5, "momentum/distance": 0.5}
    assert devices == ["meta"]


@pytest.mark.parametrize("name", ["constant", "constant_with_refresh", "linear", "exponential"])
def test_momentum_schedules_are_those_of_the_reference(name: str) -> None:
    """Its `get_xlco_momentum` at many step numbers, by the text that its command line takes."""
    keys: dict[str, Callable[..., dict[str, Any]]] = {
        "constant": lambda value: {"value": value},
        "constant_with_refresh": lambda value, every: {"value": value, "every": int(every)},
        "linear": lambda first, last, start, end: {"updates": (int(first), int(last)), "values": (start, end)},
        "exponential": lambda power, lowest, highest: {"power": power, "within": (lowest, highest)},
    }
    golden = json.loads((ROOT / "tests" / "golden" / "momentum_schedules.json").read_text())
    found = [text for text in golden if text.split(",")[0] == name]
    assert found
    for text in found:
        numbers = [float(x) for x in text.split(",")[1:]]
        tree = {"temperature": 1.0, "momentum": {"schedule": name} | keys[name](*numbers)}
        schedule = Contrast.model_validate(tree).momentum
        for step, expected in golden[text].items():
            assert momentum_at(schedule, int(step)) == pytest.approx(expected, rel=1e-15, abs=1e-15), (text, step)


def test_a_number_is_a_constant_schedule() -> None:
    for momentum in (0.5, {"schedule": "constant", "value": 0.5}):
        schedule = Contrast.model_validate({"temperature": 1.0, "momentum": momentum}).momentum
        assert isinstance(schedule, Constant) and momentum_at(schedule, 7) == 0.5
