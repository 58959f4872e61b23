"""No silent step: what is not finite is agreed on, named, counted and never applied; a run that only does so ends."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from infoxlm_ds import dist
from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Log, Recipe
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.engine.engine import NotFinite, learning_rate_at
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.monitor.sinks import Sinks
from infoxlm_ds.objective import Step
from infoxlm_ds.state import TrainState
from infoxlm_ds.trainer import fit, train_step
from tests.corpus import ROOT, small_recipe
from tests.distributed.ranks import run_ranks

CONFIGS = ROOT / "ds_configs"
EVERYWHERE = ["zero0_fp32", "zero1_fp32", "zero2_fp32", "zero1_bf16", "zero2_bf16", "zero1_fp16", "zero2_fp16"]


def _start(recipe: Recipe) -> TrainState:
    start_ranks()
    return build(agreed_inputs(recipe))


def _a_poisoned_step(rank: int, world: int, recipe: Recipe) -> tuple[list[str], int, list[str], bool, bool]:
    """Two applied steps; one in which rank 1's copy of a word is nan, which is passed over; one more. What was said of
    it, how many steps were applied, the languages of the word's sequences; whether the poisoned step changed anything,
    whether the last one did."""
    state = _start(recipe)
    while state.step < 2:
        train_step(state)
    before = _everything(state)
    micros = next(state.loader)
    word = int(micros[-1].tokens.ids[1])
    state.loader = _InHand(state.loader.lanes, micros)  # type: ignore[assignment]
    embeddings = state.objective.model.lm.get_input_embeddings().weight
    kept = embeddings.detach()[word].clone()
    if rank == 1:
        embeddings.data[word] = torch.nan
    applied = train_step(state)
    embeddings.data[word] = kept
    assert not applied and state.again is None
    after, said = _everything(state), list(state.skipped)
    train_step(state)
    return said, state.step, _languages_with(word, micros[-1]), _equal(before, after), _equal(after, _everything(state))


@dataclass
class _InHand:
    """A loader's next step, looked at beforehand, for ever."""

    lanes: list[int]
    micros: list[JointBatch]

    def __next__(self) -> list[JointBatch]:
        return self.micros


def _languages_with(word: int, micro: JointBatch) -> list[str]:
    ids, lengths, names = micro.tokens.ids, micro.tokens.layout.lengths.tolist(), micro.names
    holders = [n for n, sequence in enumerate(ids.split(lengths)) if word in sequence]
    sequences = [*names["mmlm"], *names["tlm"], *names["xlco"][:, 0], *names["xlco"][:, 0]]
    return sorted({str(sequences[n]) for n in holders})


def _everything(state: TrainState) -> list[torch.Tensor]:
    assert state.momentum is not None and state.queue is not None
    shadow = [f.values.clone() for f in state.momentum.shadow]
    masters = [f.values.detach().clone() for f in state.engine.masters(list(state.objective.parameters()))]
    return [*shadow, *masters, state.queue.vectors.clone(), torch.tensor(state.queue.pushed), torch.tensor(state.step)]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("config", EVERYWHERE)
def test_a_step_that_is_not_finite_on_one_rank_is_applied_on_none(
    corpus: Path, tmp_path: Path, fp16_on_cpu: None, config: str
) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", f"engine={CONFIGS / config}.json", "optimizer.most_skipped=30")
    results = run_ranks(_a_poisoned_step, 2, recipe)
    assert len({said[0] for said, *_ in results}) == 1  # every rank says the same
    (said,), step, languages, unchanged, unchanged_later = results[1]
    assert step == 3 and unchanged and not unchanged_later
    assert "loss not finite" in said and "on rank 1, lane 3" in said and "rank 0, lane 0" not in said.split("xlco")[0]
    assert any(name in said for name in languages)
    assert ("loss scale" in said) == ("fp16" in config)


def _an_infinite_share(rank: int, world: int, recipe: Recipe) -> tuple[bool, bool]:
    """Whether a step was applied in which rank 1's loss was infinite and all gradients finite; and whether it changed
    anything."""
    state = _start(recipe)
    train_step(state)
    before, forward = _everything(state), state.engine.forward
    share = iter([torch.tensor(torch.inf if rank == 1 else 0.0), torch.tensor(0.0)])

    def forwarding(*arguments: Any) -> Any:
        losses, *rest = forward(*arguments)
        return losses | {"more": next(share)}, *rest

    state.engine.forward = forwarding  # type: ignore[method-assign]
    return train_step(state), not _equal(before, _everything(state))


@pytest.mark.parametrize("config", ["zero0_fp32", "zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_fp32"])
def test_an_infinite_loss_with_finite_gradients_is_not_applied(corpus: Path, tmp_path: Path, config: str) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", f"engine={CONFIGS / config}.json")
    assert run_ranks(_an_infinite_share, 2, recipe) == [(False, False)] * 2


def _diverge(rank: int, world: int, recipe: Recipe) -> tuple[str, int]:
    state = _start(recipe)
    with (
        Sinks(recipe.run, 0, recipe.optimizer.steps, Log(tensorboard=False)) if rank == 0 else nullcontext() as sinks,
        pytest.raises(NotFinite) as caught,
    ):
        fit(state, sinks)
    return str(caught.value), state.step


@pytest.mark.parametrize("config", ["zero0_fp32", "zero1_fp32", "zero3_bf16"])
def test_steps_that_are_never_applied_end_the_run_with_its_last_good_checkpoint(
    corpus: Path, tmp_path: Path, config: str
) -> None:
    """A learning rate that throws the weights out of their range. The checkpoint before that is named and whole."""
    engine = f"engine={CONFIGS / config}.json"
    wild = ("optimizer.learning_rate=1e30", "optimizer.clip=0", "optimizer.most_skipped=3", "checkpoint.every=1")
    for message, step in run_ranks(_diverge, 2, small_recipe(corpus, tmp_path / "run", engine, *wild)):
        assert step < 6 and f"3 steps in a row after step {step} were not applied" in message
        assert f"step-{step:08d}" in message and "learning_rate" in message
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("skipped" in json.loads(line) for line in lines) == 3


def _first_steps(rank: int, world: int, recipe: Recipe) -> tuple[list[str], dict[str, float], int, int]:
    rates: list[float] = []  # of updates, none of steps that are skipped
    update = torch.optim.AdamW.step

    def updating(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.extend(group["lr"] for group in optimizer.param_groups)
        return update(optimizer, *arguments)

    torch.optim.AdamW.step = updating  # type: ignore[method-assign, assignment]  # in this fork alone
    state = _start(recipe)
    said = []
    while state.step < 2:
        if not train_step(state):
            said.append(state.skipped[-1])
    expected = [learning_rate_at(step, recipe.optimizer) for step in (1, 2)]
    assert sorted(set(rates), key=rates.index) == expected  # whatever was skipped before
    assert state.queue is not None
    return said, state.meter.collect().sums, state.consumed, state.queue.pushed


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_finds_its_loss_scale_and_says_so(corpus: Path, tmp_path: Path, fp16_on_cpu: None, stage: int) -> None:
    engine = f"engine={CONFIGS}/zero{stage}_fp16.json"
    recipe = small_recipe(corpus, tmp_path / "run", engine, "optimizer.clip=0", "weights.mmlm=30")
    for said, sums, consumed, pushed in run_ranks(_first_steps, 2, recipe):
        assert said and all("normal at the start" in text and "all losses are finite" in text for text in said)
        assert consumed == 2  # a batch that overflowed was tried again, so that data are in step with updates
        assert sums["skipped"] == 2 * len(said) and sums["steps"] == 2 * 2
        assert pushed == 2 * recipe.batch.lanes * recipe.batch.xlco_pairs  # keys of skipped steps are not queued


def _never_finite(rank: int, world: int, recipe: Recipe) -> str:
    state = _start(recipe)
    with pytest.raises(NotFinite) as caught:
        while True:
            train_step(state)
    return str(caught.value)


def test_fp16_that_overflows_at_the_smallest_scale_ends(corpus: Path, tmp_path: Path, fp16_on_cpu: None) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", f"engine={CONFIGS}/zero1_fp16.json", "weights.mmlm=1e9")
    for message in run_ranks(_never_finite, 2, recipe):
        assert "smallest loss scale" in message


def _fall_silent(rank: int, world: int, recipe: Recipe) -> None:
    """Rank 1 does nothing from its third step on."""
    state = _start(recipe)
    prepare = state.objective.prepare

    def preparing(*arguments: Any) -> Step:
        if rank == 1 and state.step == 2:
            time.sleep(60)
        return prepare(*arguments)

    state.objective.prepare = preparing  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError):
        fit(state, None)


def test_the_timeout_is_long_up_to_the_first_step_and_short_from_then_on(corpus: Path, tmp_path: Path) -> None:
    recipe = small_recipe(corpus, tmp_path / "run", "timeout={start: 600, step: 2}")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):  # the other rank has returned
        run_ranks(_fall_silent, 2, recipe, timeout=15)


def _wait(rank: int, world: int, seconds: int) -> float:
    start_ranks()
    dist.barrier()
    dist.set_timeout(seconds)
    started = time.monotonic()
    if rank == 1:
        time.sleep(10 * seconds)
        return 0.0
    with pytest.raises(RuntimeError):
        dist.barrier()
    return time.monotonic() - started


def test_a_rank_waits_no_longer_than_the_timeout() -> None:
    waited, _ = run_ranks(_wait, 2, 1)
    assert waited < 8
