"""The Triton kernel of the softmax equals the passes."""

from __future__ import annotations

import pytest
import torch

from infoxlm_ds.losses.softmax import softmax_, softmax_by_passes

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_kernel_equals_the_passes(device: torch.device, dtype: torch.dtype) -> None:
    """For XLM-R's vocabulary with its padding, rows with a word that is nearly certain or far from zero, and none."""
    torch.manual_seed(0)
    logits, vocabulary = 3 * torch.randn(70, 250_048, device=device), 250_002
    logits[1, 17] = 40
    logits[2] -= 300
    logits = logits.to(dtype)
    expected = logits.clone()
    log_sums = softmax_(logits, vocabulary)
    torch.testing.assert_close(log_sums, softmax_by_passes(expected, vocabulary), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE[dtype], atol=1e-7)
    assert not logits[:, vocabulary:].any()
    assert softmax_(logits[:0], vocabulary).shape == (0,)
