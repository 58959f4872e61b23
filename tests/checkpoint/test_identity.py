"""A change of the recipe that puts other items into the windows of the data is known as such."""

from __future__ import annotations

import pytest

from infoxlm_ds.checkpoint.identity import Difference
from infoxlm_ds.config import Sampling, SamplingStage


@pytest.mark.parametrize(
    "sampling",
    [Sampling(most_epochs=2), Sampling(stages=(SamplingStage(from_step=5, alpha=0.1),))],
    ids=["cap", "stages"],
)
def test_what_a_step_takes_changes_the_order_only_if_the_sampling_depends_on_it(sampling: Sampling) -> None:
    for key in ("optimizer.steps", "batch.xlco_pairs"):
        assert Difference(key, 1, 2).reorders(sampling)
        assert not Difference(key, 1, 2).reorders(Sampling())
    assert Difference("sampling.weights.mono.de", None, 2).reorders(Sampling())
    assert not Difference("optimizer.warmup", 1, 2).reorders(sampling)
