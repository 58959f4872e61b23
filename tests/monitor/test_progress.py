"""The progress line fits the screen and keeps what matters most."""

from __future__ import annotations

import pytest

from infoxlm_ds.monitor.progress import progress_line

VALUES = {
    "mmlm/loss": 9.5977,
    "tlm/loss": 9.593,
    "xlco/loss": 5.4438,
    "xlco/accuracy": 0.1441,
    "optimizer/skipped_steps": 2.0,
    "speed/tokens": 25536.1,
    "speed/mfu": 0.413,
    "speed/data_wait_share": 0.0045,
    "queue/filled": 0.5,
}
WHOLE = (
    "step 10/150000 mmlm 9.598 tlm 9.593 xlco 5.444 acc 0.144 left 41:40:00 skipped 2 tok/s 25,536 queue 50% mfu 41.3% "
    "data wait 0.4%"
)


def test_a_file_has_everything() -> None:
    assert progress_line(10, 150_000, VALUES, 150_000) == WHOLE


@pytest.mark.parametrize("width", [60, 61, 80, 100, 120, 200])
def test_a_screen_has_a_part_from_the_beginning(width: int) -> None:
    line = progress_line(10, 150_000, VALUES, 150_000, width)
    assert len(line) <= width and WHOLE.startswith(line)
    assert "xlco 5.444 acc 0.144" in line
    assert width < len(WHOLE) or line == WHOLE


def test_what_a_run_does_not_have_is_left_out() -> None:
    values = {"mmlm/loss": 1.0, "speed/tokens": 100.0, "speed/data_wait_share": 0.0, "optimizer/skipped_steps": 0.0}
    assert progress_line(1, 2, values, 1) == "step 1/2 mmlm 1.000 left 0:00:01 tok/s 100.000 data wait 0.0%"
