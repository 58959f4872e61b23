"""`infoxlm plan`: prints what a recipe needs as tables, or writes it as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from infoxlm_ds.atomic import write_file
from infoxlm_ds.engine.config import load_engine_config
from infoxlm_ds.planner.cost import flops, tokens_per_step, useful, wire
from infoxlm_ds.planner.memory import memory, smallest_world, stages
from infoxlm_ds.planner.speed import ASSUMED, mfu, step_seconds, tokens_per_second
from infoxlm_ds.planner.workload import Setting, Shape, read_text
from infoxlm_ds.reading import load_recipe

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "momentum", "queue", "activations", "logits", "buffers", "host", "peak")


@dataclass(frozen=True)
class Wishes:
    """The options of `infoxlm plan`. `tokens_per_second` is the user's measurement for one GPU; without it, the time is
    estimated from `peak_flops` and `utilisation` (MFU) or, without that, by planner/speed.py."""

    ranks: int
    memory_gib: float | None = None
    tokens: float | None = None
    vocabulary: int | None = None
    tokens_per_second: float | None = None
    peak_flops: float = 989e12
    utilisation: float | None = None


def read_setting(path: Path, overrides: list[str], wishes: Wishes) -> Setting:
    """A recipe on the wished number of ranks. UserError if it is wrong or cannot run on so many."""
    recipe = load_recipe(path, overrides)
    recipe.batch.lanes_of(0, wishes.ranks)
    text = read_text(recipe, wishes.vocabulary)
    return Setting(recipe, load_engine_config(recipe.engine), Shape.of(recipe, text.vocabulary), text, wishes.ranks)


def days(s: Setting, wishes: Wishes) -> float:
    """Days to train on the wished number of tokens."""
    assert wishes.tokens is not None
    return wishes.tokens / (_tokens_per_second(s, wishes) * s.world) / 86400


def _knows_speed(s: Setting, wishes: Wishes) -> bool:
    """Whether the speed is given or can be estimated: the model of a GPU's parts is for 16 bits."""
    return s.precision != "fp32" or wishes.tokens_per_second is not None or wishes.utilisation is not None


def _tokens_per_second(s: Setting, wishes: Wishes) -> float:
    """Tokens a second of one GPU."""
    if wishes.tokens_per_second is not None:
        return wishes.tokens_per_second
    if wishes.utilisation is not None:
        return tokens_per_step(s) * wishes.peak_flops * wishes.utilisation / useful(s)
    return tokens_per_second(s)


def as_json(s: Setting, wishes: Wishes) -> dict[str, Any]:
    """Everything that the tables show, in bytes and operations."""
    limit = wishes.memory_gib and wishes.memory_gib * GIB
    tree: dict[str, Any] = {
        "ranks": s.world,
        "stage": s.stage,
        "notes": list(s.text.notes),
        "parameters": {"whole": s.shape.whole, "momentum": s.shape.momentum},
        "memory": [asdict(memory(variant)) for variant in stages(s)],
        "flops": flops(s),
        "wire": wire(s),
        "tokens_per_step": tokens_per_step(s),
        "step_seconds": step_seconds(s) if s.precision != "fp32" else None,
    }
    if limit:
        tree["smallest_world"] = {variant.stage: smallest_world(variant, limit) for variant in stages(s)}
    if wishes.tokens is not None:
        tree |= {"steps": wishes.tokens / tokens_per_step(s)}
        if _knows_speed(s, wishes):
            tree |= {"days": days(s, wishes)}
    return tree


def write_json(s: Setting, wishes: Wishes, path: Path) -> None:
    """Write what `as_json` gives. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(as_json(s, wishes), indent=1) + "\n")


def print_plan(s: Setting, wishes: Wishes, console: Console) -> None:
    """Print memory by ZeRO stage, the cost of a step and, as far as they are known, speed and days."""
    shape, batch, init = s.shape, s.recipe.batch, s.recipe.model.init
    if init and shape.own:
        console.print(f"model.init {init} cannot be read now: the shape comes from the recipe", soft_wrap=True)
    copied = f"; the momentum encoder has {shape.momentum / 1e6:.1f}M of them" if s.has_momentum else ""
    console.print(
        f"{shape.whole / 1e6:.1f}M parameters{copied}\n"
        f"{s.world} ranks, {batch.lanes} lanes, {s.accumulation} a rank; {s.precision}; ZeRO {s.stage}"
        f"{', activation checkpointing' if s.checkpointing else ''}\n" + "\n".join(s.text.notes),
        highlight=False,
        soft_wrap=True,
    )
    console.print(_memory_table(s, wishes))
    console.print(_cost_table(s))
    if s.precision != "fp32":
        console.print(_speed(s), highlight=False, soft_wrap=True)
    if wishes.tokens is not None:
        console.print(_time(s, wishes), highlight=False, soft_wrap=True)


def _memory_table(s: Setting, wishes: Wishes) -> Table:
    table = _table(f"GiB a rank, on {s.world}")
    table.add_column("")
    limit, columns = (wishes.memory_gib or 0) * GIB, []
    for variant in stages(s):
        table.add_column(
            f"ZeRO {variant.stage}{' *' if variant.stage == s.stage else ''}", justify="right", no_wrap=True
        )
        needed = memory(variant)
        cells = {name: f"{getattr(needed, name) / GIB:.2f}" for name in KINDS} | {"peak at": needed.peak_at}
        if limit:
            cells["fits"] = "yes" if needed.peak <= limit else "no"
            cells["smallest world"] = str(smallest_world(variant, limit) or "none")
        columns.append(cells)
    for name in columns[0]:
        if name != "host" or any(float(cells[name]) for cells in columns):
            table.add_row(name, *(cells[name] for cells in columns))
    table.caption = (
        "* the recipe's stage. The peak is the largest sum at any moment: activations are freed before gradients are "
        "reduced. Sentences of the contrast have their largest length"
    )
    return table


def _cost_table(s: Setting) -> Table:
    table = _table("a step")
    for heading in ("", "TFLOP", "", "MB sent by a rank"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    operations, sent = flops(s), wire(s)
    extra = operations.pop("recomputed")
    left = [*operations.items(), ("in all", useful(s)), ("recomputed in addition", extra)]
    right = [*sent.items(), ("in all", sum(sent.values()))]
    for i in range(max(len(left), len(right))):
        table.add_row(*_cells(left, i, 1e12), *_cells(right, i, 1e6))
    table.caption = "forward and backward, no padding, LM head on masked rows only; sentences of mean length"
    return table


def _cells(rows: list[tuple[str, float]], number: int, unit: float) -> tuple[str, str]:
    return (rows[number][0], f"{rows[number][1] / unit:,.3f}") if number < len(rows) else ("", "")


def _time(s: Setting, wishes: Wishes) -> str:
    assert wishes.tokens is not None
    steps = f"{wishes.tokens:,.0f} tokens: {wishes.tokens / tokens_per_step(s):,.0f} steps of {tokens_per_step(s):,.0f}"
    if not _knows_speed(s, wishes):
        return f"{steps} (days need --tokens-per-second)"
    if wishes.tokens_per_second is not None:
        speed = f"at {wishes.tokens_per_second:,.0f} tokens/s a GPU, as given"
    elif wishes.utilisation is not None:
        speed = (
            f"assuming an MFU of {wishes.utilisation:g} of {wishes.peak_flops / 1e12:g} TFLOP/s a GPU: "
            "give --tokens-per-second once it is measured"
        )
    else:
        speed = "as above: give --tokens-per-second once it is measured"
    return f"{steps}, {days(s, wishes):.1f} days on {s.world} GPUs ({speed})"


def _speed(s: Setting) -> str:
    parts = step_seconds(s)
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items())
    used = mfu(useful(s), whole, ASSUMED.peak, s.world)
    return (
        f"{tokens_per_second(s):,.0f} tokens/s and an MFU of {used:.0%} on each {ASSUMED.name}, by "
        f"a model of its parts that no GPU has confirmed, without what ranks send ({shares})"
    )


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
