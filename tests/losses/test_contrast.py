"""Contrast equals a plain float64 implementation in one process: loss, gradients and counts, on one rank and on
several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as torch_dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from infoxlm_ds.losses import contrast as module
from infoxlm_ds.losses.contrast import Keys, contrast, contrast_gradients, with_gradients
from tests.distributed.ranks import run_ranks

WIDTH = 6


def _oracle(
    query: Tensor,
    key: Tensor,
    ids: Tensor,
    temperature: float,
    symmetric: bool,
    queue: Keys | None,
    in_batch: bool = True,
) -> Tensor:
    """Mean over pairs of the cross-entropy of full logits, one direction or both."""
    n, losses = len(query), []
    for anchor, target in [(query, key), (key, query)] if symmetric else [(query, key)]:
        excluded = _share(ids, ids) | (not in_batch)
        excluded.fill_diagonal_(False)
        logits = [(anchor @ target.t() / temperature).masked_fill(excluded, -torch.inf)]
        if queue is not None:
            logits.append((anchor @ queue.vectors.t() / temperature).masked_fill(_share(ids, queue.ids), -torch.inf))
        losses.append(cross_entropy(torch.cat(logits, 1), torch.arange(n)))
    return torch.stack(losses).mean()


def _share(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] == 0:
        return torch.zeros(len(a), len(b), dtype=torch.bool)
    return (a[:, None, :, None] == b[None, :, None, :]).any(-1).any(-1)


def _draw(seed: int, n: int, k: int, n_ids: int) -> tuple[Tensor, Tensor, Tensor, Keys | None]:
    g = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(n, WIDTH, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    ids = torch.randint(3 * n, (n, n_ids), generator=g)
    queue = Keys(torch.randn(k, WIDTH, generator=g, dtype=torch.float64), torch.randint(3 * n, (k, n_ids), generator=g))
    return query, key, ids, queue if k else None


@pytest.fixture(autouse=True)
def ragged_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", 3)
    monkeypatch.setattr(module, "TILE_KEYS", 5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9), st.sampled_from([0, 1, 13]), st.sampled_from([0, 2, 4]), st.booleans())
def test_gradients_of_both_sides_equal_the_oracle(seed: int, n: int, k: int, n_ids: int, symmetric: bool) -> None:
    query, key, ids, queue = _draw(seed, n, k, n_ids)
    expected = _oracle(query, key, ids, 0.2, symmetric, queue)
    gradients = torch.autograd.grad(expected, (query, key))
    share, d_query, d_key, _ = contrast_gradients(
        query, key, ids=ids, temperature=0.2, symmetric=symmetric, queue=queue
    )
    torch.testing.assert_close(share, expected.detach(), atol=1e-12, rtol=1e-12)
    loss = with_gradients(share, (query, d_query), (key, d_key))
    for ours, theirs in zip(torch.autograd.grad(loss, (query, key)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9), st.sampled_from([1, 13]), st.sampled_from([0, 2]), st.booleans())
def test_momentum_keys_equal_the_oracle_lane_by_lane(seed: int, n: int, k: int, n_ids: int, in_batch: bool) -> None:
    query, key, ids, queue = _draw(seed, n, k, n_ids)
    expected = _oracle(query, key.detach(), ids, 0.2, False, queue, in_batch)
    (gradient,) = torch.autograd.grad(expected, query)
    total = query.new_zeros(())
    for lane in torch.arange(n).split(4):  # the lanes' shares add up
        share, report = contrast(
            query[lane],
            Keys(key.detach(), ids),
            lane,
            ids=ids[lane],
            temperature=0.2,
            total=n,
            in_batch=in_batch,
            queue=queue,
        )
        total = total + share
        assert queue is not None
        allowed = ~_share(ids[lane], queue.ids)
        if in_batch:
            columns = ~_share(ids[lane], ids)
            columns[torch.arange(len(lane)), lane] = False
            allowed = torch.cat([allowed, columns], 1)
        assert report.negatives.tolist() == allowed.sum(1).tolist()
    torch.testing.assert_close(total.detach(), expected.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, query)[0], gradient, atol=1e-12, rtol=1e-12)


def _on_rank(rank: int, world: int, n: int, symmetric: bool) -> tuple[float, Tensor, Tensor]:
    torch_dist.init_process_group("gloo")
    query, key, ids, queue = _draw(7, n, 11, 2)
    mine = torch.arange(n).chunk(world)[rank]
    share, d_query, d_key, _ = contrast_gradients(
        query[mine].detach(), key[mine].detach(), ids=ids[mine], temperature=0.2, symmetric=symmetric, queue=queue
    )
    return float(share), d_query, d_key


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranks_together_give_the_gradient_of_one_process(world: int, symmetric: bool) -> None:
    query, key, ids, queue = _draw(7, 12, 11, 2)
    expected = _oracle(query, key, ids, 0.2, symmetric, queue)
    gradients = torch.autograd.grad(expected, (query, key))
    results = run_ranks(_on_rank, world, 12, symmetric)
    assert sum(share for share, _, _ in results) == pytest.approx(float(expected.detach()), abs=1e-12)
    for side in (0, 1):
        ours = torch.cat([result[1 + side] for result in results])
        torch.testing.assert_close(ours, gradients[side], atol=1e-12, rtol=1e-12)


def test_the_gradient_survives_a_tiny_loss() -> None:
    """At a loss of 1e-4 fp32 keeps five digits of the gradient; logits in 16 bits have none left."""
    g = torch.Generator().manual_seed(0)
    key = torch.nn.functional.normalize(torch.randn(64, 32, generator=g, dtype=torch.float64), dim=1)
    query = torch.nn.functional.normalize(key + 0.02 * torch.randn(64, 32, generator=g, dtype=torch.float64), dim=1)
    ids = torch.arange(128).reshape(64, 2)
    exact_query = query.clone().requires_grad_()
    exact = _oracle(exact_query, key, ids, 0.05, False, None)
    assert 1e-6 < float(exact.detach()) < 1e-3
    (gradient,) = torch.autograd.grad(exact, exact_query)
    narrow = query.float().requires_grad_()
    share, _ = contrast(
        narrow, Keys(key.float(), ids), torch.arange(64), ids=ids, temperature=0.05, total=64, in_batch=True, queue=None
    )
    (ours,) = torch.autograd.grad(share, narrow)
    assert float((ours - gradient).norm() / gradient.norm()) < 1e-4
