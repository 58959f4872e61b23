"""The log shows the mean over all rows of all ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist

from infoxlm_ds.monitor.meters import Interval, Meter, by_language, scalars
from tests.distributed.ranks import run_ranks


def _on_rank(rank: int, world: int) -> Interval:
    torch_dist.init_process_group("gloo")
    meter = Meter()
    # Three items in two directions: losses 1, 2, 3 and 4, 5, 6. The last three rows are hits.
    columns = torch.stack([torch.arange(1.0, 7.0) + rank, torch.tensor([0.0, 0, 0, 1, 1, 1])])
    meter.add_rows("xlco", np.array([["de-en"], ["en-ru"], ["de-en"]], object), columns)
    meter.add_rows("xlco", np.array([["de-en", "en-ru"]], object), torch.tensor([[10.0], [1.0]]))  # a mixed pair
    return meter.collect()


def test_loss_and_accuracy_by_language_pair() -> None:
    for interval in run_ranks(_on_rank, 2):
        pairs = interval.means("xlco")
        assert pairs["de-en"]["loss"] == pytest.approx(np.mean([1, 3, 4, 6, 10, 2, 4, 5, 7, 10]))
        assert pairs["en-ru"]["loss"] == pytest.approx(np.mean([2, 5, 10, 3, 6, 10]))
        assert pairs["de-en"]["accuracy"] == pytest.approx(0.6)
        assert pairs["en-ru"]["accuracy"] == pytest.approx(4 / 6)


def test_the_loss_of_each_language_is_the_mean_over_its_rows() -> None:
    meter = Meter()
    meter.add_rows("mmlm", np.array(["de", "en", "de"]), torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0, 0, 1, 2]))
    meter.add_rows("tlm", np.array(["de-en", "en-fr"]), torch.tensor([[1.0, 5, 6]]), torch.tensor([0, 1, 1]))
    interval = meter.collect()
    assert interval.means("mmlm") == {"de": {"loss": pytest.approx(7 / 3)}, "en": {"loss": 3.0}}
    assert by_language(interval.rows["mmlm"], {}) == {"de": pytest.approx(7 / 3), "en": 3.0}
    sides = {"de-en": ("de", "en"), "en-fr": ("en", "fr")}
    assert by_language(interval.rows["tlm"], sides) == {"de": 1.0, "en": 4.0, "fr": 5.5}
    assert meter.collect().rows == {}


def test_a_language_without_a_masked_piece_has_no_mean() -> None:
    meter = Meter()
    meter.add_rows("tlm", np.array(["de-en", "uk-zh"]), torch.tensor([[1.0]]), torch.tensor([0]))
    assert meter.collect().means("tlm") == {"de-en": {"loss": 1.0}}


def test_the_bound_counts_the_negatives_that_were_left() -> None:
    columns = {"repelled": 1.0, "positive": 8.0, "hardest": 4.0, "hits": 3, "above": 2, "positives": 0}
    sums = {f"xlco/{name}": value for name, value in columns.items()}
    sums |= {"xlco/items": 4, "xlco/loss": 2.0, "xlco/negatives": 30, "xlco/masked": 10, "xlco/dropped": 0}
    sums["xlco/log_choices"] = 3 * math.log(1 + 9) + math.log(1 + 3)
    out = scalars(sums, 100)
    assert out["xlco/information_bound"] == pytest.approx(sums["xlco/log_choices"] / 4 - 0.5)
    assert (out["xlco/accuracy"], out["xlco/rank"], out["xlco/gradient_share"]) == (0.75, 1.5, 0.25)
    assert (out["xlco/masked_share"], out["xlco/dropped_share"], out["xlco/negatives"]) == (0.25, 0.0, 7.5)
    for name in ("dropped", "positives"):  # then there is no bound
        assert "xlco/information_bound" not in scalars(sums | {f"xlco/{name}": 1}, 100)
