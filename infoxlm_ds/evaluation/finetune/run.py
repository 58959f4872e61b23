"""`infoxlm finetune`: all seeds, then the table."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from infoxlm_ds import dist
from infoxlm_ds.config import UserError
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.evaluation.finetune.data import read_data
from infoxlm_ds.evaluation.finetune.results import print_results, summarize, write_results
from infoxlm_ds.evaluation.finetune.settings import Settings, keep_settings
from infoxlm_ds.evaluation.finetune.training import train_seed


def finetune(settings: Settings, console: Console) -> dict[str, Any]:
    """Train and measure all seeds that are not finished. Prints a table; writes results.json and returns what it
    holds. UserError for a wrong input."""
    data = read_data(settings)
    keep_settings(settings)
    start_ranks()
    if dist.world_size() > 1:
        raise UserError("infoxlm finetune runs on one GPU or CPU: start it without a launcher")
    results = [train_seed(settings, seed, data) for seed in range(1, settings.seeds + 1)]
    summary = summarize(settings, results)
    write_results(summary, settings.out)
    print_results(summary, console)
    return summary
