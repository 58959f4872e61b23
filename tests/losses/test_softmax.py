"""The softmax of rows of logits in place, by several passes and by the Triton kernel under its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoxlm_ds.losses.softmax import softmax_by_passes

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}

# In a process of its own: Triton chooses its interpreter when it is imported.
KERNEL = """
import sys
from safetensors.torch import load_file, save_file
from infoxlm_ds.losses.softmax_kernel import softmax_by_kernel
logits = load_file(sys.argv[1])["logits"]
save_file({"log_sum": softmax_by_kernel(logits, int(sys.argv[2])), "softmax": logits}, sys.argv[1])
"""


def _logits(dtype: torch.dtype, rows: int = 5) -> torch.Tensor:
    """Rows of usual size, one with a word that is nearly certain, and one far from zero."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(rows, 20000, dtype=torch.float64)
    logits[1, 17] = 40
    logits[2] -= 300
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_passes_equal_torch_and_leave_padding_at_zero(dtype: torch.dtype) -> None:
    logits, vocabulary = _logits(dtype), 19990
    exact = logits[:, :vocabulary].double().clone()
    log_sum = softmax_by_passes(logits, vocabulary)
    torch.testing.assert_close(log_sum.double(), exact.logsumexp(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[:, :vocabulary].double(), exact.softmax(1), rtol=TOLERANCE[dtype], atol=1e-7)
    assert not logits[:, vocabulary:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_equals_the_passes(dtype: torch.dtype, tmp_path: object) -> None:
    pytest.importorskip("triton", reason="torch without a GPU does not bring it; make installs it")
    logits, vocabulary, file = _logits(dtype), 19990, f"{tmp_path}/logits.safetensors"
    save_file({"logits": logits}, file)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNEL, file, str(vocabulary)], env=environment, check=True, timeout=120)
    found = load_file(file)
    torch.testing.assert_close(found["log_sum"], softmax_by_passes(logits, vocabulary), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["softmax"], logits, rtol=TOLERANCE[dtype], atol=1e-7)
