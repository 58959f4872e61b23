"""What the contrast needs once a step is made once a step, however many lanes a rank has."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from infoxlm_ds.build import agreed_inputs, build
from infoxlm_ds.config import Recipe
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.losses.keys import TextIndex
from infoxlm_ds.trainer import rehearse, train_step
from tests.corpus import small_recipe
from tests.distributed.ranks import run_ranks


def _sorted_texts(rank: int, world: int, recipe: Recipe) -> list[int]:
    """How many rows of text ids were sorted in a step of four lanes against a full queue, after a rehearsal."""
    start_ranks()
    state = build(agreed_inputs(recipe))
    while state.queue is None or state.queue.filled < 1:
        train_step(state)
    rows: list[int] = []
    make = TextIndex.__init__

    def counted(index: TextIndex, ids: Tensor) -> None:
        rows.append(len(ids))
        make(index, ids)

    assert rehearse(state) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextIndex, "__init__", counted)
        train_step(state)
    state.loader.close()
    return sorted(rows)


@pytest.mark.parametrize("keys", ["momentum", "gradient"])
def test_text_ids_of_the_step_and_of_the_queue_are_sorted_once(corpus: Path, tmp_path: Path, keys: str) -> None:
    """24 pairs a step, 40 keys in the queue."""
    recipe = small_recipe(corpus, tmp_path / "run", f"contrast.keys={keys}")
    assert run_ranks(_sorted_texts, 1, recipe) == [[24, 40]]
