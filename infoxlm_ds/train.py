"""What the DeepSpeed launcher runs: `deepspeed infoxlm_ds/train.py recipes/demo.yaml [key.path=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import psutil

from infoxlm_ds.config import Recipe, UserError, load_recipe

STOPPED_ON_REQUEST = 75  # EX_TEMPFAIL: run the same command again to go on


def main(arguments: list[str] | None = None) -> int:
    """Build, fit, close: one rank. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_args(arguments)
    try:
        return _run(load_recipe(options.recipe, options.overrides))
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"infoxlm: {error}", file=sys.stderr)
        return 2


def _run(recipe: Recipe) -> int:
    _quiet()
    from infoxlm_ds import dist, trainer
    from infoxlm_ds.engine import start_ranks
    from infoxlm_ds.monitor.sinks import Sinks

    start_ranks()
    state = build(recipe)
    first = dist.rank() == 0
    if state.step >= recipe.optimizer.steps:
        if first:
            print(f"{recipe.run}: finished at step {state.step}, nothing to do")
        return 0
    with Sinks(recipe.run, recipe.optimizer.steps, recipe.log.tensorboard) if first else nullcontext() as sinks:
        if sinks is not None:
            sinks.say(_summary(state))
        done = trainer.fit(state, sinks)
        if sinks is not None and not done:
            sinks.say(f"stopped on request at step {state.step}, saved: run the same command again to go on")
    state.loader.close()
    return 0 if done else STOPPED_ON_REQUEST


def build(recipe: Recipe):  # type: ignore[no-untyped-def]  # TrainState; imported late, so that a wrong recipe fails at once
    """Everything `fit` needs, from scratch or from the run's newest checkpoint. All checks come before anything is
    written."""
    import torch

    from infoxlm_ds import dist
    from infoxlm_ds.checkpoint import Checkpoints
    from infoxlm_ds.data.batch import N_TEXTS, longest_sequence
    from infoxlm_ds.data.loader import Loader
    from infoxlm_ds.data.reader import Corpus
    from infoxlm_ds.engine import Engine, load_engine_config
    from infoxlm_ds.model.momentum import MomentumEncoder
    from infoxlm_ds.model.pretrained import build_model, check_fit
    from infoxlm_ds.model.queue import KeyQueue
    from infoxlm_ds.monitor.probe import RetrievalProbe
    from infoxlm_ds.objective import Objective
    from infoxlm_ds.trainer import TrainState

    engine_config = load_engine_config(recipe.engine)
    corpus = Corpus(recipe.corpus)
    vocabulary = corpus.manifest.tokenizer.vocab_size
    tokenizer = recipe.corpus / "tokenizer"
    check_fit(recipe.model, tokenizer, longest_sequence(recipe, corpus))
    loader = Loader(recipe, corpus, dist.rank(), dist.world_size())
    checkpoints = Checkpoints(recipe.run, recipe.checkpoint.keep)
    latest = checkpoints.latest_for(recipe)
    probe = RetrievalProbe(recipe.probe, tokenizer, corpus.manifest.max_tokens + 2) if recipe.probe else None
    model = build_model(recipe.model, vocabulary, recipe.seed)
    objective = Objective(recipe, model)
    engine = Engine(objective, engine_config, recipe.optimizer, recipe.batch.lanes)
    momentum = queue = None
    contrast = recipe.contrast
    if recipe.tasks["xlco"] and contrast.keys == "momentum":
        momentum = MomentumEncoder(model.sentence_encoder(), engine.masters, contrast.momentum, engine.sharded)
    if recipe.tasks["xlco"] and contrast.uses_queue:
        width = model.lm.config.hidden_size
        queue = KeyQueue(contrast.queue_size, width, N_TEXTS[contrast.mixup], dist.device())
    state = TrainState(recipe, loader, objective, engine, momentum, queue, checkpoints, probe, vocabulary)
    if latest is not None:
        saved = checkpoints.load(latest, engine, momentum, queue)
        state.step, state.consumed = saved.step, saved.consumed
        loader.restore(saved.consumed, saved.cursors)
    elif dist.rank() == 0:
        shutil.copytree(tokenizer, recipe.run / "model", dirs_exist_ok=True)  # what an export needs beside the weights
        model.lm.config.save_pretrained(recipe.run / "model")
    torch.manual_seed(recipe.seed + dist.rank())
    return state


def launch(recipe_path: Path, overrides: list[str], ranks: int | None = None) -> int:
    """Run `main` under DeepSpeed's launcher on this machine: every GPU, or `ranks` CPU processes (two, if the lanes
    allow it)."""
    recipe = load_recipe(recipe_path, overrides)
    ranks = ranks or _default_ranks(recipe.batch.lanes)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if not _gpus():
        environment["DS_ACCELERATOR"] = "cpu"
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(ranks),
        "--log_level",
        "error",
    ]
    command += ["--master_port", str(_free_port()), "--no_local_rank", __file__, str(recipe_path), *overrides]
    process = subprocess.Popen(command, env=environment)

    def forward(number: int, frame: FrameType | None) -> None:
        # To the ranks alone: the launcher would leave them 30 seconds to save.
        for child in psutil.Process(process.pid).children(recursive=True):
            if not child.children():
                child.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)
    return process.wait()


def _summary(state) -> str:  # type: ignore[no-untyped-def]
    from infoxlm_ds import dist

    recipe, parameters = state.recipe, sum(p.numel() for p in state.objective.parameters())
    tasks = "+".join(task for task, used in recipe.tasks.items() if used)
    where = (
        f"{dist.world_size()} rank(s) on {dist.device().type}, {recipe.batch.lanes} lanes, ZeRO {state.engine.stage}"
    )
    filling = state.queue is not None and state.queue.filled < 1
    return (
        f"{recipe.run}: {tasks}, {parameters / 1e6:.1f}M parameters, {where}, "
        f"step {state.step} of {recipe.optimizer.steps}"
        + (f"; the queue of {len(state.queue)} fills before XlCo reads it" if filling else "")
    )


def _default_ranks(lanes: int) -> int:
    most = _gpus() or min(2, os.cpu_count() or 1)
    return max(n for n in range(1, most + 1) if lanes % n == 0)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quiet() -> None:
    """DeepSpeed's start-up chatter is not the user's; warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


if __name__ == "__main__":
    sys.exit(main())
