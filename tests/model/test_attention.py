"""Where attention can be one varlen call."""

from __future__ import annotations

import pytest
import torch

from infoxlm_ds.model.attention import why_not_varlen


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "width", "reason"),
    [
        ("cuda", (9, 0), torch.bfloat16, 64, None),
        ("cuda", (8, 0), torch.float16, 256, None),
        ("cuda", (7, 5), torch.float16, 64, "compute capability 7"),
        ("cuda", (9, 0), torch.float32, 64, "not in float32"),
        ("cuda", (9, 0), torch.bfloat16, 20, "a width of 20"),
        ("cuda", (9, 0), torch.bfloat16, 264, "a width of 264"),
        ("cpu", (0, 0), torch.bfloat16, 64, "the device is cpu"),
    ],
)
def test_the_reason_why_attention_runs_in_groups(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = why_not_varlen(torch.device(device), dtype, width)
    assert found is None if reason is None else reason in str(found)
