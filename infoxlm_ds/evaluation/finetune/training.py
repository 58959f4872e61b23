"""Trains a model on a task with one seed, and measures the best epoch on the test files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from infoxlm_ds import dist
from infoxlm_ds.atomic import write_file
from infoxlm_ds.config import Optimizer, UserError
from infoxlm_ds.data.upload import to_device
from infoxlm_ds.engine.config import load_engine_config
from infoxlm_ds.engine.engine import Engine, learning_rate_at
from infoxlm_ds.evaluation.finetune.data import Data, Prepared, prepare
from infoxlm_ds.evaluation.finetune.measure import Scores, scores
from infoxlm_ds.evaluation.finetune.packing import collate, packed
from infoxlm_ds.evaluation.finetune.settings import Settings
from infoxlm_ds.evaluation.finetune.states import Progress, load_state, load_weights, save_model, save_state
from infoxlm_ds.evaluation.finetune.task_model import TaskModel, load_task_model
from infoxlm_ds.model.families import positions_of

RESULT = "result.json"
ENGINES = {"cuda": "zero1_bf16", "cpu": "zero0_fp32"}
LOGGED = 10  # steps between two losses on the board


@dataclass
class Run:
    """One seed: what is trained, with what, and how far it is."""

    settings: Settings
    seed: int
    folder: Path
    model: TaskModel
    tokenizer: Any
    data: Prepared
    optimizer: Optimizer
    engine: Engine
    progress: Progress
    board: SummaryWriter


def train_seed(settings: Settings, seed: int, data: Data) -> dict[str, Any]:
    """Train and measure one seed, or go on with it. Returns what its result.json holds; a finished seed is only
    read."""
    folder = settings.out / f"seed-{seed}"
    if (folder / RESULT).is_file():
        print(f"seed {seed}: finished before", flush=True)
        return _read_result(folder)
    run = start(settings, seed, folder, data)
    try:
        while run.progress.epoch < settings.epochs and not _out_of_patience(run):
            _epoch(run)
        return _finish(run)
    finally:
        run.board.close()


def _read_result(folder: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / RESULT} cannot be read ({error}): remove {folder} to train this seed again"
        ) from None
    return result


def start(settings: Settings, seed: int, folder: Path, data: Data) -> Run:
    """A seed, at its beginning or after its last whole epoch."""
    model, tokenizer = load_task_model(settings.model, settings.of_task.kind, data.labels, settings.dropout, seed)
    longest = min(settings.max_tokens, positions_of(model.model.config), tokenizer.model_max_length)
    prepared = prepare(data, settings, tokenizer, longest)
    steps = sum(len(_batches(settings, seed, epoch, prepared)) for epoch in range(settings.epochs))
    optimizer = Optimizer(
        learning_rate=settings.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        steps=steps,
        warmup=round(settings.warmup * steps),
    )
    engine = Engine(model, load_engine_config(Path(ENGINES[dist.device().type])), optimizer, lanes=1)
    progress = load_state(folder, engine)
    print(f"seed {seed}: {len(prepared.train)} sequences, {steps} steps, from epoch {progress.epoch}", flush=True)
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=progress.step + 1)
    return Run(settings, seed, folder, model, tokenizer, prepared, optimizer, engine, progress, board)


def _batches(settings: Settings, seed: int, epoch: int, data: Prepared) -> list[np.ndarray]:
    lengths = np.array([len(item.ids) for item in data.train])
    return packed(lengths, settings.batch_tokens, np.random.default_rng([seed, epoch]))


def _out_of_patience(run: Run) -> bool:
    patience = run.settings.patience
    return patience is not None and run.progress.epoch - run.progress.best >= patience


def _epoch(run: Run) -> None:
    """Train one epoch, measure it on the dev files, keep the model if it is the best, and keep the state."""
    loss = train_epoch(run)
    dev = fmean(_scores(run, "dev")[run.settings.of_task.metrics[0]].values())
    _keep(run, dev)
    print(f"seed {run.seed} epoch {run.progress.epoch}: loss {loss:.4f}, dev {100 * dev:.1f}", flush=True)


def train_epoch(run: Run) -> float:
    """Train one epoch. Returns the mean loss of its steps."""
    progress, engine = run.progress, run.engine
    torch.manual_seed(1000 * run.seed + progress.epoch)  # of dropout, so that a seed goes on as if never stopped
    losses = []
    run.model.train()
    for numbers in _batches(run.settings, run.seed, progress.epoch, run.data):
        batch = to_device(collate([run.data.train[i] for i in numbers]), dist.device())
        loss = engine.forward(batch)
        engine.backward(loss)
        rate = learning_rate_at(progress.step + 1, run.optimizer)
        if not engine.step(progress.step):
            raise UserError(
                f"seed {run.seed}: gradients are not finite at step {progress.step + 1}: lower --learning-rate"
            )
        progress.step += 1
        losses.append(loss.detach())
        if progress.step % LOGGED == 0:
            run.board.add_scalar("train/loss", float(loss.detach()), progress.step)
            run.board.add_scalar("train/learning_rate", rate, progress.step)
    progress.epoch += 1
    return float(torch.stack(losses).mean())


def _keep(run: Run, dev: float) -> None:
    progress = run.progress
    if not progress.dev or dev > max(progress.dev):
        progress.best = progress.epoch
        save_model(run.folder / f"best-{progress.best}", run.engine, run.model, run.tokenizer)
    progress.dev.append(dev)
    save_state(run.folder, run.engine, progress)


def _scores(run: Run, split: str) -> Scores:
    by_language = run.data.dev if split == "dev" else run.data.test
    found = scores(run.model, by_language, run.data.labels, run.settings.of_task, run.settings.batch_tokens)
    for metric, values in found.items():
        for language, value in values.items():
            run.board.add_scalar(f"{split}_{metric}/{language}", value, run.progress.step)
    return found


def _finish(run: Run) -> dict[str, Any]:
    """Measure the best epoch on the test files. Its model becomes `model/`, and the states are removed."""
    progress, folder = run.progress, run.folder
    load_weights(folder / f"best-{progress.best}", run.model)
    result = {"seed": run.seed, "epoch": progress.best, "dev": progress.dev, "test": _scores(run, "test")}
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(folder / f"best-{progress.best}", folder / "model")
    write_file(folder / RESULT, json.dumps(result, indent=1) + "\n", durable=True)
    for path in (*folder.glob("epoch-*"), *folder.glob("best-*")):
        shutil.rmtree(path)
    return result
