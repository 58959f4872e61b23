"""The chunked linear cross-entropy equals torch's on full logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infoxlm_ds.losses import masked_lm as module
from infoxlm_ds.losses.softmax import softmax_by_passes
from tests.tensor_memory import TensorMemory


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_loss_and_gradients_equal_cross_entropy_of_full_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 16)
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((50, 8), (50,)))
    labels, weights = torch.randint(50, (rows,)), torch.rand(rows, dtype=torch.float64)
    expected_rows = torch.nn.functional.cross_entropy(hidden @ weight.t() + bias, labels, reduction="none")
    expected = (expected_rows * weights).sum()
    gradients = torch.autograd.grad(3 * expected, (hidden, weight, bias))
    weighted, each = module.masked_lm(hidden, weight, bias, labels, weights)
    total = weighted[: rows // 2].sum() + weighted[rows // 2 :].sum()  # summed in any parts
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(each, expected_rows.detach(), atol=1e-12, rtol=1e-12)
    assert not each.requires_grad
    for ours, theirs in zip(torch.autograd.grad(3 * total, (hidden, weight, bias)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits_are_near_the_exact_ones_also_of_words_that_are_nearly_certain(dtype: torch.dtype) -> None:
    """A softmax near 1 has a coarse grid in 16 bits; its distance to 1 is what is learned from."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((60, 16), (80, 16), (80,))]
    labels, weights = (tensors[0] @ tensors[1].t()).argmax(1), torch.full((60,), 1 / 60)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    hidden, weight, bias = exact
    rows = torch.nn.functional.cross_entropy(hidden @ weight.t() + bias, labels, reduction="none")
    expected = torch.autograd.grad((rows * weights).sum(), exact)
    for size in (module.CHUNK_ROWS, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK_ROWS", size)
            weighted, _ = module.masked_lm(tensors[0], tensors[1], tensors[2], labels, weights)
        for ours, theirs in zip(torch.autograd.grad(weighted.sum(), tensors), expected, strict=True):
            assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.02


def test_a_gradient_that_is_collected_does_not_reach_the_matrix() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8), torch.randn(50, 8).requires_grad_()
    labels = torch.randint(50, (7,))
    collected: list[torch.Tensor] = []
    weighted, _ = module.masked_lm(hidden, weight, torch.zeros(50), labels, torch.ones(7), collect=collected.append)
    (2 * weighted.sum()).backward()
    assert weight.grad is None
    plain, _ = module.masked_lm(hidden, weight, torch.zeros(50), labels, torch.ones(7))
    (2 * plain.sum()).backward()
    assert len(collected) == 1
    torch.testing.assert_close(collected[0], weight.grad)


def test_sixteen_bit_inputs_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(300, 16).bfloat16(), torch.randn(80, 16).bfloat16(), torch.zeros(80).bfloat16()
    labels = torch.randint(80, (300,))
    weighted, _ = module.masked_lm(hidden, weight, bias, labels, torch.ones(300))
    total = weighted.sum()
    exact = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=1e-5, atol=0)


def test_a_loss_scale_carries_gradients_that_16_bits_cannot_hold() -> None:
    """The weight of each row is one divided by many thousand rows."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).half().requires_grad_() for shape in ((60, 16), (80, 16), (80,))]
    labels, weights = torch.randint(80, (60,)), torch.full((60,), 1e-7)
    half_hidden, half_weight, half_bias = tensors
    weighted, _ = module.masked_lm(half_hidden, half_weight, half_bias, labels, weights)
    gradients = torch.autograd.grad(weighted.sum() * 2.0**20, tensors)
    hidden, weight, bias = exact = [t.detach().double().requires_grad_() for t in tensors]
    rows = torch.nn.functional.cross_entropy(hidden @ weight.t() + bias, labels, reduction="none")
    for ours, theirs in zip(gradients, torch.autograd.grad((rows * weights).sum(), exact), strict=True):
        assert float((ours.double() / 2.0**20 - theirs).norm() / theirs.norm()) < 0.01


def test_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And beside the gradient of the matrix, that of one chunk."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 100)
    hidden, weight = torch.randn(400, 16), torch.randn(5000, 16).requires_grad_()
    with TensorMemory() as tensors:
        before = tensors.alive
        weighted, _ = module.masked_lm(hidden, weight, torch.zeros(5000), torch.arange(400), torch.ones(400))
        peak = tensors.peak - before
    chunk, matrix = 4 * 100 * 5000, 4 * 5000 * 16
    assert chunk + matrix < peak < 1.1 * chunk + 3 * matrix  # the matrix itself, its gradient, and a chunk's
    assert weighted.requires_grad


ROWS, VOCABULARY = 32, 500
SOFTMAX = 3  # what the kernel moves of each logit: it reads a row twice and writes it once
FEW = ("gather", "scatter_")  # these touch one logit of a row


class _Accesses(TorchDispatchMode):
    """Counts how often each operation reads or writes all logits of a chunk."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in FEW:
            touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.by_name[name] += sum(x.numel() == ROWS * VOCABULARY for x in touched)
        return out


def test_on_a_gpu_16_bit_logits_move_14_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stands for three of seven accesses; the rest is counted here."""

    def kernel(logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return softmax_by_passes(logits, vocabulary)

    monkeypatch.setattr(module, "softmax_", kernel)
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape).bfloat16().requires_grad_() for shape in ((ROWS, 16), (VOCABULARY, 16), (VOCABULARY,))
    )
    with _Accesses() as accesses:
        weighted, _ = module.masked_lm(hidden, weight, bias, torch.randint(VOCABULARY, (ROWS,)), torch.ones(ROWS))
        weighted.sum().backward()
    assert 2 * (sum(accesses.by_name.values()) + SOFTMAX) == 14, accesses.by_name
