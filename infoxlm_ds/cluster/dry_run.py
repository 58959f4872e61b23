"""`infoxlm train --dry-run`: says what a run would do. It checks what the ranks would check, and writes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console

from infoxlm_ds.build import Inputs, compiles
from infoxlm_ds.checkpoint.tools import read_through
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.mixture import expected
from infoxlm_ds.model.pretrained import build_model
from infoxlm_ds.planner.cost import tokens_per_step
from infoxlm_ds.planner.memory import checkpoint_bytes
from infoxlm_ds.planner.mixture import planned_shares
from infoxlm_ds.planner.report import GIB, Wishes, print_plan
from infoxlm_ds.planner.workload import Setting, Shape, read_text

GB = 1e9
SHOWN = 5  # sources by name


def dry_run(inputs: Inputs, ranks: int, slots: Mapping[str, int], console: Console) -> None:
    """Check the rest of what a run needs, and print what it would do. `slots`: ranks by host; empty: this machine.
    UserError as the ranks would raise it."""
    recipe, engine = inputs.identity.recipe, inputs.identity.engine
    text = read_text(recipe)
    setting = Setting(recipe, engine, Shape.of(recipe, text.vocabulary), text, ranks)
    compiles(recipe, engine)
    _check_checkpoint(inputs, console)
    _check_weights(inputs)
    disk = _disk(setting, recipe)

    tokens = recipe.optimizer.steps * tokens_per_step(setting)
    here = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
    print_plan(setting, Wishes(ranks, here, tokens if setting.precision != "fp32" else None), console)
    newest = inputs.checkpoints.store.latest()
    where = ", ".join(f"{n} on {host}" for host, n in slots.items()) or "this machine"
    lines = (
        *_data(inputs),
        f"run: {recipe.run}, {f'goes on from {newest.name}' if newest else 'starts'}",
        f"steps: {recipe.optimizer.steps:,} of {tokens_per_step(setting):,.0f} tokens, {tokens:,.0f} in all",
        f"ranks: {ranks} ({where}), {setting.accumulation} of {recipe.batch.lanes} lanes each",
        disk,
        "nothing was started or written",
    )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _data(inputs: Inputs) -> Iterator[str]:
    """What each task reads. `infoxlm prep mix` has the whole table."""
    recipe = inputs.identity.recipe
    for task, shares in planned_shares(recipe, inputs.corpus).items():
        sources = expected(recipe, inputs.corpus, task)
        passes = [source.passes for source in sources]
        often = f"{min(passes):.2f}" + f" to {max(passes):.2f}" * (len(passes) > 1)
        names = ", ".join(source.source.name for source in sources[:SHOWN])
        more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
        yield f"{task}: {sum(s.rows for s in sources):,.0f} items of {names}{more}, {often} passes"
        yield f"  texts: {', '.join(f'{language} {share:.1%}' for language, share in shares.items())}"


def _check_checkpoint(inputs: Inputs, console: Console) -> None:
    """Read the checkpoint that the run would go on from, as the ranks do."""
    newest = inputs.checkpoints.store.latest()
    if newest is None or inputs.identity.recipe.resume.fallback:
        return
    if damage := read_through(newest, console):
        raise UserError(f"{newest}: {damage}: {inputs.checkpoints.remedy()}")


def _check_weights(inputs: Inputs) -> None:
    """Load the weights of `model.init`, which is the only way to know that they can be loaded."""
    recipe, tokenizer = inputs.identity.recipe, inputs.corpus.manifest.tokenizer
    if recipe.model.init is not None:
        build_model(recipe.model, tokenizer.vocab_size, recipe.seed, tokenizer.special_ids)


def _disk(setting: Setting, recipe: Recipe) -> str:
    """A line about the disk. UserError if the checkpoints do not fit: while one is written, there is one more than is
    kept."""
    folder = _nearest(recipe.run)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to: correct `run` or its permissions")
    settings, steps = recipe.checkpoint, recipe.optimizer.steps
    saves = -(-steps // settings.every)
    others = steps // settings.keep_every if settings.keep_every else 0
    most = min(saves, settings.keep + 1 + others)
    each, free = checkpoint_bytes(setting), shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in (recipe.run / "checkpoints").glob("step-*/*") if path.is_file())
    if most * each - there > free:
        raise UserError(
            f"{most} checkpoints of {each / GB:.1f} GB do not fit into {folder}, which has {free / GB:.1f} GB: "
            "free some space, take another `run`, or set a smaller checkpoint.keep or a larger checkpoint.keep_every"
        )
    return f"disk: {most} checkpoints of {each / GB:.2f} GB at most; {free / GB:.1f} GB are free in {folder}"


def _nearest(run: Path) -> Path:
    """The run's folder or, if it is not there yet, the nearest thing above it that is there."""
    folder = run.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
