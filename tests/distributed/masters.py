"""The fp32 master weights of an engine, put together from all ranks' fragments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from infoxlm_ds import dist
from infoxlm_ds.engine.engine import MOMENTS, Engine
from infoxlm_ds.losses.queue import KeyQueue
from infoxlm_ds.model.momentum import Fragment
from infoxlm_ds.state import TrainState


def whole_masters(engine: Engine, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The masters of these parameters, in their shapes. Collective."""
    return whole(engine.masters(parameters), parameters, engine.sharded)


@torch.no_grad()
def whole(fragments: Sequence[Fragment], parameters: Sequence[nn.Parameter], sharded: bool) -> list[Tensor]:
    """These parameters from the fragments of all ranks. Collective."""
    shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]  # stage 3 keeps the shape beside an empty parameter
    buffer = torch.zeros(sum(shape.numel() for shape in shapes))
    flat = buffer.split([shape.numel() for shape in shapes])
    for fragment in fragments:
        flat[fragment.parameter][fragment.start : fragment.start + len(fragment.values)] = fragment.values
    if sharded:
        dist.sum_over_ranks(buffer)
    return [values.view(shape) for values, shape in zip(flat, shapes, strict=True)]


def whole_state(state: TrainState, queue: bool = True) -> dict[str, Tensor]:
    """Masters, key weights, queue and temperature of a run, by name. Collective."""
    names, parameters = zip(*state.objective.model.named_parameters(prefix="model"), strict=True)
    out = dict(zip(names, whole_masters(state.engine, parameters), strict=True))
    if state.momentum is not None:
        names, parameters = zip(*state.momentum.encoder.named_parameters(prefix="key"), strict=True)
        out |= zip(names, whole(state.momentum.shadow, parameters, state.engine.sharded), strict=True)
    if queue and state.queue is not None:
        out |= {f"queue.{name}": value for name, value in _whole_queue(state.queue).items()}
    if state.objective.temperature is not None:
        out["temperature"] = state.objective.temperature().detach().clone()
    return out


def checkpointed_state(state: TrainState) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of a run's tensors, whole, by name: masters and moments of all parameters, key
    weights, queue. Collective."""
    names, parameters = zip(*state.engine.parameters.items(), strict=True)
    out = {name: x for name, x in whole_state(state).items() if name.startswith(("key.", "queue."))}
    fragments: dict[str, list[Fragment]] = {kind: [] for kind in ("master", *MOMENTS)}
    for name, start, values in state.engine.state():
        for kind, x in values.items():
            fragments[kind].append(Fragment(names.index(name), start, x))
    for kind, parts in fragments.items():
        tensors = whole(parts, parameters, state.engine.sharded)
        out |= {f"{kind}.{name}": x for name, x in zip(names, tensors, strict=True)}
    steps = [moments["step"] for moments in state.engine.optimizer.state.values()]
    assert all(torch.equal(step, steps[0]) for step in steps)
    return out | {"applied steps": steps[0].cpu()}


def _whole_queue(queue: KeyQueue) -> dict[str, Tensor]:
    """All rows in order, of a sharded queue from all ranks."""
    parts = dist.gather_objects(queue.state_dict()) if queue.sharded else [queue.state_dict()]
    rows: dict[str, Tensor] = {}
    for part in parts:
        assert isinstance(part, dict)
        order = part.pop("numbers")
        assert int(part["pushed"]) >= queue.size
        rows |= {name: torch.cat([rows.get(name, value[:0]), value]) for name, value in part.items() if value.ndim}
        rows["numbers"] = torch.cat([rows.get("numbers", order[:0]), order])
    order = rows["numbers"].argsort()
    return {name: value[order].clone() for name, value in rows.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Euclidean distance of two states."""
    return sum(float((one[name] - other[name]).square().sum()) for name in other) ** 0.5


def assert_close(value: Tensor, expected: Tensor, name: str) -> None:
    """To 1e-5 of the tensor's largest value. To 3e-5 for biases, which begin at zero: 1.5e-5 was measured with trained
    keys, whose gradients nearly cancel, depending on the CPU."""
    if not value.is_floating_point():
        assert torch.equal(value, expected), name
        return
    if name.endswith("attention.self.key.bias"):  # its gradient is mathematically zero: Adam steps on noise
        return
    largest = float(expected.abs().max()) or 1.0
    bound = 3e-5 if name.endswith(".bias") else 1e-5
    torch.testing.assert_close(value, expected, atol=bound * largest, rtol=1e-5, msg=name)
