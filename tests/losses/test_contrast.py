"""Contrast on any number of ranks equals its plain definition, in float64 in one process:
loss, gradients and counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, softplus

from infoxlm_ds.losses import negatives
from infoxlm_ds.losses.contrast import Form, Keys, Report, contrast, contrast_with_keys
from infoxlm_ds.losses.temperature import Temperature
from tests.distributed.ranks import run_ranks
from tests.losses import oracle

WIDTH = 5
EXACT: dict[str, Any] = {"atol": 1e-11, "rtol": 1e-12}  # float64, of scores up to a few thousand


@dataclass(frozen=True)
class Case:
    """A step: the numbers of pairs and hard negatives of each rank, the queue, and every option."""

    seed: int
    pairs: list[int]
    hard: list[int] | None
    queue: int
    sharded: bool
    texts: int
    spread: float
    symmetric: bool
    key_gradient: bool
    form: Form
    tiles: tuple[int, int]


@st.composite
def cases(draw: st.DrawFn, world: int) -> Case:
    queue = draw(st.sampled_from([0, 1, 13]))
    hard = draw(st.none() | st.lists(st.integers(0, 4), min_size=world, max_size=world))
    symmetric = draw(st.booleans())
    form = Form(
        in_batch=draw(st.booleans()) if queue or (hard is not None and not symmetric) else True,
        margin=draw(st.sampled_from([0.0, 0.3])),
        cosine=draw(st.booleans()),
        same_text=draw(st.sampled_from(["mask", "positive", "ignore"])),
        drop_within=draw(st.sampled_from([None, 0.0, 0.2])),
    )
    return Case(
        draw(st.integers(0, 999)),
        draw(st.lists(st.integers(0, 9), min_size=world, max_size=world)),
        hard,
        queue,
        draw(st.booleans()),
        draw(st.sampled_from([0, 2, 4])),
        draw(st.sampled_from([0.1, 1.0, 20.0])),
        symmetric,
        draw(st.booleans()),
        form,
        draw(st.sampled_from([(3, 5), (1, 1), (64, 64)])),
    )


@dataclass
class Step:
    query: Tensor
    key: Tensor
    ids: Tensor
    temperature: Tensor
    queue: Keys | None
    hard: Keys | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.temperature, *([self.hard.vectors] if self.hard is not None else [])]


def _step(case: Case) -> Step:
    """The tensors of the whole step, the same on every rank."""
    g = torch.Generator().manual_seed(case.seed)
    n = sum(case.pairs)

    def vectors(count: int) -> Tensor:
        return case.spread * torch.randn(count, WIDTH, generator=g, dtype=torch.float64)

    def keys(count: int) -> Keys:
        return Keys(vectors(count), torch.randint(3 * n + 1, (count, case.texts), generator=g))

    hard = keys(sum(case.hard)) if case.hard is not None else None
    step = Step(vectors(n), vectors(n), keys(n).ids, torch.tensor(0.3).double(), keys(case.queue), hard)
    step.queue = step.queue if case.queue else None
    for leaf in step.leaves:
        leaf.requires_grad_()
    return step


def _expected(case: Case) -> tuple[Tensor, list[Tensor]]:
    step = _step(case)
    if not case.key_gradient:
        step.key.requires_grad_(False)
        if step.hard is not None:
            step.hard.vectors.requires_grad_(False)
    loss = oracle.mean_loss(
        step.query,
        step.key,
        step.temperature,
        case.form,
        ids=step.ids,
        queue=step.queue,
        hard=step.hard,
        symmetric=case.symmetric,
    )
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in step.leaves]


def _ours(case: Case, rank: int, world: int) -> tuple[Tensor, list[Tensor]]:
    """For this rank: the loss, and gradients whose mean over ranks is the step's gradient."""
    negatives.TILES["cpu"] = case.tiles
    step = _step(case)
    own = _range(case.pairs, rank)
    hard = queue = None
    if step.hard is not None and case.hard is not None:
        at = _range(case.hard, rank)
        hard = Keys(step.hard.vectors[at], step.hard.ids[at])
    if step.queue is not None:
        part = slice(rank, None, world) if case.sharded else slice(None)
        queue = Keys(step.queue.vectors[part], step.queue.ids[part], case.sharded)
    loss, _ = contrast(
        step.query[own],
        step.key[own],
        step.temperature,
        case.form,
        ids=step.ids[own],
        queue=queue,
        hard=hard,
        symmetric=case.symmetric,
        key_gradient=case.key_gradient,
    )
    loss.backward()
    return loss.detach(), [torch.zeros_like(x) if x.grad is None else x.grad / world for x in step.leaves]


def _range(counts: list[int], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def _all(rank: int, world: int, drawn: list[Case]) -> list[tuple[Tensor, list[Tensor]]]:
    torch_dist.init_process_group("gloo")
    return [_ours(case, rank, world) for case in drawn]


def _compare(case: Case, results: list[tuple[Tensor, list[Tensor]]]) -> None:
    loss, gradients = _expected(case)
    for ours, _ in results:
        torch.testing.assert_close(ours, loss, **EXACT)
    for number, gradient in enumerate(gradients):
        scale = max(1.0, float(gradient.abs().max())) if gradient.numel() else 1.0
        together = sum(result[1][number] for result in results)
        torch.testing.assert_close(together, gradient, atol=1e-11 * scale, rtol=1e-12)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(negatives.TILES, "cpu", (3, 5))


@settings(max_examples=300, deadline=None)
@given(cases(1))
def test_one_process_equals_the_definition(case: Case) -> None:
    _compare(case, [_ours(case, 0, 1)])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_the_definition(world: int) -> None:
    """Ranks have different numbers of pairs, some none, and options are random. A fork runs many cases, because
    starting ranks takes seconds."""

    @settings(max_examples=4, deadline=None, phases=[Phase.generate])  # shrinking would start ranks a thousand times
    @given(st.lists(cases(world), min_size=40, max_size=40))
    def check(drawn: list[Case]) -> None:
        results = run_ranks(_all, world, drawn)
        for case, result in zip(drawn, zip(*results, strict=True), strict=True):
            _compare(case, list(result))

    check()


def _counts(rank: int, world: int, case: Case) -> list[tuple[Tensor, ...]]:
    torch_dist.init_process_group("gloo")
    negatives.TILES["cpu"] = case.tiles
    step, own = _step(case), _range(case.pairs, rank)
    assert step.queue is not None
    queue = Keys(step.queue.vectors[rank::world], step.queue.ids[rank::world], True)
    _, report = contrast(
        step.query[own], step.key[own], 0.3, case.form, ids=step.ids[own], queue=queue, symmetric=case.symmetric
    )
    return [column.chunk(2) for column in report]


@pytest.mark.parametrize("same_text", ["mask", "positive"])
def test_the_report_counts_what_the_loss_left_out(same_text: Any) -> None:
    form = Form(same_text=same_text, drop_within=0.5)
    case = Case(3, [5, 0, 7], None, 11, True, 3, 1.0, True, True, form, (3, 5))
    step = _step(case)
    results = run_ranks(_counts, 3, case)
    assert step.queue is not None
    for direction, (anchor, target) in enumerate([(step.query, step.key), (step.key, step.query)]):
        scores = anchor.detach() @ torch.cat([target.detach(), step.queue.vectors]).t() / 0.3
        own, n = scores.diagonal()[:, None], len(anchor)
        other = ~torch.eye(n, scores.shape[1], dtype=torch.bool)
        same = oracle.share(step.ids, torch.cat([step.ids, step.queue.ids])) & other
        free = other & ~same
        dropped = free & (scores >= own - 0.5 / 0.3)
        expected = {
            "positive": own[:, 0],
            "hardest": scores.masked_fill(~free, -torch.inf).amax(1),
            "negatives": (free & ~dropped).sum(1),
            "masked": (same & (same_text == "mask")).sum(1),
            "positives": (same & (same_text == "positive")).sum(1),
            "dropped": dropped.sum(1),
            "above": (free & (scores >= own)).sum(1),
        }
        if same_text == "mask":
            away = scores.masked_fill(~free | dropped, -torch.inf).logsumexp(1) - own[:, 0]
            expected |= {"loss": softplus(away), "repelled": away.sigmoid()}
        assert int(dropped.sum()) > 0 and int(same.sum()) > 0
        for name, value in expected.items():
            ours = torch.cat([columns[Report._fields.index(name)][direction] for columns in results])
            torch.testing.assert_close(ours, value, msg=name)


@settings(max_examples=60, deadline=None)
@given(cases(1), st.integers(1, 4))
def test_parts_with_keys_made_before_equal_the_definition(case: Case, size: int) -> None:
    """Shares and gradients add up over the parts of a step."""
    case = replace(case, symmetric=False, key_gradient=False)
    assume(case.queue or case.form.in_batch or case.hard is not None)
    step = _step(case)
    loss, (d_query, _, d_temperature, *_) = _expected(case)
    keys, ours = Keys(step.key.detach(), step.ids), torch.zeros_like(loss)
    for first in range(0, max(1, len(step.query)), size):
        part = slice(first, min(len(step.query), first + size))
        share, report = contrast_with_keys(
            step.query[part],
            keys,
            first,
            step.temperature,
            case.form,
            ids=step.ids[part],
            queue=step.queue,
            hard=step.hard,
            total=len(step.query),
        )
        share.backward()
        ours += share.detach()
        assert len(report.loss) == part.stop - first
    if len(step.query) == 0:
        return
    assert step.query.grad is not None and step.temperature.grad is not None
    torch.testing.assert_close(ours, loss, **EXACT)
    for gradient, expected in ((step.query.grad, d_query), (step.temperature.grad, d_temperature)):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(gradient, expected, atol=1e-11 * scale, rtol=1e-12)


def _without_collectives(rank: int, world: int) -> float:
    torch_dist.init_process_group("gloo")
    step = _step(Case(1, [3, 4], [2, 1], 7, False, 2, 1.0, True, True, Form(), (3, 5)))
    own, hard = _range([3, 4], rank), _range([2, 1], rank)
    assert step.hard is not None
    loss, _ = contrast(
        step.query[own],
        step.key[own],
        step.temperature,
        ids=step.ids[own],
        queue=step.queue,
        hard=Keys(step.hard.vectors[hard], step.hard.ids[hard]),
        symmetric=True,
    )
    torch_dist.destroy_process_group()
    loss.backward()
    return float(loss)


def test_backward_needs_no_collective() -> None:
    """Backward runs after the process group is gone."""
    one, other = run_ranks(_without_collectives, 2)
    assert one == other


def _in_a_group(rank: int, world: int, case: Case) -> tuple[Tensor, list[Tensor]] | None:
    torch_dist.init_process_group("gloo")
    group = torch_dist.new_group([0, 2])
    if rank == 1:
        return None
    place = rank // 2
    step, own = _step(case), _range(case.pairs, place)
    assert step.queue is not None
    queue = Keys(step.queue.vectors[place::2], step.queue.ids[place::2], True)
    loss, _ = contrast(
        step.query[own], step.key[own], step.temperature, ids=step.ids[own], queue=queue, symmetric=True, group=group
    )
    loss.backward()
    return loss.detach(), [torch.zeros_like(x) if x.grad is None else x.grad / 2 for x in step.leaves]


def test_a_process_group_is_a_world_of_its_own() -> None:
    case = Case(5, [3, 4], None, 7, True, 2, 1.0, True, True, Form(), (3, 5))
    results = run_ranks(_in_a_group, 3, case)
    _compare(case, [result for result in results if result is not None])


@pytest.mark.parametrize("loss", [1e-1, 1e-4])
def test_the_gradient_survives_a_tiny_loss(loss: float) -> None:
    """float32 against float64: an error of 1e-5 of the norm at a loss of 1e-4. Logits in 16 bits have
    no gradient left there."""
    g = torch.Generator().manual_seed(0)
    key = normalize(torch.randn(64, 128, generator=g, dtype=torch.float64), dim=1)
    query = normalize(key + 0.02 * torch.randn(64, 128, generator=g, dtype=torch.float64), dim=1)
    older, no_ids = torch.randn(4096, 128, generator=g, dtype=torch.float64), torch.zeros(4096, 0, dtype=torch.int64)
    queue, ids = Keys(normalize(older, dim=1), no_ids), no_ids[:64]
    temperature = {1e-1: 0.092, 1e-4: 0.053}[loss]
    exact = query.clone().requires_grad_()
    value = oracle.mean_loss(exact, key, temperature, Form(), ids=ids, queue=queue)
    assert loss / 2 < float(value.detach()) < loss * 2
    (gradient,) = torch.autograd.grad(value, exact)
    narrow = query.float().requires_grad_()
    ours, _ = contrast(narrow, key.float(), temperature, queue=Keys(queue.vectors.float(), queue.ids))
    (d_query,) = torch.autograd.grad(ours, narrow)
    assert float((d_query - gradient).norm() / gradient.norm()) < 1e-5
    assert float(ours.detach()) == pytest.approx(float(value.detach()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_vectors_with_logits_beyond_16_bits_give_a_finite_loss(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (300 * torch.randn(9, 64, generator=g).to(dtype) for _ in range(2))
    query.requires_grad_()
    key.requires_grad_()
    loss, _ = contrast(query, key, 0.01)
    exact = oracle.mean_loss(query.double(), key.double(), 0.01, Form(), ids=torch.zeros(9, 0, dtype=torch.int64))
    largest = float(max(x.detach().abs().max() for x in (query, key)))
    for side in torch.autograd.grad(loss, (query, key)):  # each row is at most s times the difference of two vectors
        assert bool(side.isfinite().all()) and float(side.abs().max()) <= 1.01 * 100 * 2 * largest
    assert loss.dtype == torch.float32 and float(loss.detach()) > 65504
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)


def test_a_loss_scale_carries_the_gradient_of_16_bit_vectors() -> None:
    """Each entry of the gradient is far below the smallest fp16 number."""
    g = torch.Generator().manual_seed(0)
    key = normalize(torch.randn(64, 128, generator=g), dim=1).half()
    query = normalize(key.float() + 0.02 * torch.randn(64, 128, generator=g), dim=1).half().requires_grad_()
    loss, _ = contrast(query, key, 0.05)
    (d_query,) = torch.autograd.grad(loss * 2.0**16, query)
    exact = query.detach().double().requires_grad_()
    no_ids = torch.zeros(64, 0, dtype=torch.int64)
    oracle.mean_loss(exact, key.double(), 0.05, Form(), ids=no_ids).backward()
    assert exact.grad is not None and float(exact.grad.abs().max()) < 2**-16
    assert float((d_query.double() / 2.0**16 - exact.grad).norm() / exact.grad.norm()) < 0.01


def test_far_apart_logits_do_not_overflow_or_vanish() -> None:
    """Negatives lie a thousand nats above and below the positive, in the same tile and in the next."""
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    for level in (-1000.0, -95.0, 0.0, 60.0, 95.0, 1000.0):
        values = [level, level + 1, *[level - 5] * 8]
        queue = Keys(torch.tensor([[v, 0.0] for v in values]), torch.zeros(10, 0, dtype=torch.int64))
        loss, _ = contrast(query, torch.zeros(1, 2), 1.0, Form(in_batch=False), queue=queue)
        exact = torch.nn.functional.softplus(torch.tensor(values).double().logsumexp(0))
        assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)


def test_keys_gradients_keep_their_precision_at_large_logits() -> None:
    """Inner products of several hundred, float32 against float64."""
    g = torch.Generator().manual_seed(0)
    query, key = (4 * torch.randn(96, 256, generator=g) for _ in range(2))
    exact = [x.double().requires_grad_() for x in (query, key)]
    no_ids = torch.zeros(96, 0, dtype=torch.int64)
    oracle.mean_loss(exact[0], exact[1], 0.25, Form(), ids=no_ids, symmetric=True).backward()
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    loss, report = contrast(leaves[0], leaves[1], 0.25, symmetric=True)
    assert float(report.hardest.max()) > 500
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
        assert theirs.grad is not None
        assert float((ours - theirs.grad).norm() / theirs.grad.norm()) < 1e-4


def test_equal_vectors_are_dropped_from_rows_and_columns_alike() -> None:
    """Scores of equal vectors differ only by rounding, and rows and columns round differently. A cut at the positive's
    own score removes them all, as a mask by their texts does."""
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(20, 64, generator=g).repeat(3, 1) for _ in range(2))
    ids, form = torch.arange(20).repeat(3)[:, None], Form(cosine=True, drop_within=0.0)
    gradients = []
    for texts in (None, ids):
        leaves = [x.clone().requires_grad_() for x in (query, key)]
        loss, report = contrast(leaves[0], leaves[1], 0.05, form, ids=texts, symmetric=True)
        gradients.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        if texts is None:
            assert int(report.dropped.min()) >= 2
    for by_score, by_text in zip(*gradients, strict=True):
        torch.testing.assert_close(by_score, by_text, rtol=1e-5, atol=1e-7)


def test_a_learned_temperature_stays_within_its_bounds_and_comes_back() -> None:
    temperature = Temperature(0.1, 0.05, 0.2)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=0.5)
    for push, bound in ((1.0, 0.05), (-1.0, 0.2), (1.0, 0.05)):  # descent lowers, raises and lowers the temperature
        for _ in range(20):
            optimizer.zero_grad()
            (push * temperature() * 10).backward()
            optimizer.step()
        assert float(temperature().detach()) == pytest.approx(bound)
    with pytest.raises(ValueError, match="lowest"):
        Temperature(0.3, 0.05, 0.2)


def test_under_autocast_the_inside_stays_in_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(9, 16, generator=g).requires_grad_() for _ in range(2))
    expected = torch.autograd.grad(contrast(query, key, 0.1, symmetric=True)[0], (query, key))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = contrast(query, key, 0.1, symmetric=True)
    for ours, theirs in zip(torch.autograd.grad(loss, (query, key)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("setting", [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_products_run_in_float32_where_the_caller_allows_tf32(
    setting: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has an older and a newer setting, and reading the older one fails if the newer was set."""
    matmul, seen = torch.backends.cuda.matmul, []
    addmm = torch.addmm

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(matmul.fp32_precision)
        return addmm(*args, **kwargs)

    before = matmul.fp32_precision
    setattr(matmul, *setting)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "addmm", noted)
            x = torch.randn(7, 4, requires_grad=True)
            contrast(x, x.detach(), 0.1, symmetric=True)
            contrast_with_keys(x, Keys(x.detach(), torch.zeros(7, 0, dtype=torch.int64)), 0, 0.1, total=7)
        assert len(seen) > 2 and set(seen) == {"ieee"}
        assert getattr(matmul, setting[0]) == setting[1]
    finally:
        if setting[0] == "allow_tf32":
            matmul.allow_tf32 = False
        matmul.fp32_precision = before


def test_a_temperature_in_bf16_is_close_to_the_one_in_fp32() -> None:
    """It begins exactly, and is rounded by at most 1/256 of how far it has moved, in logarithms."""
    for start in (0.07, 0.05, 0.25):
        temperature = Temperature(start, start / 4, start * 4).bfloat16()
        assert temperature().dtype == torch.float32 and float(temperature()) == pytest.approx(start, rel=1e-7)
        for ratio in (-1.3, -0.3, 0.011, 0.7):
            with torch.no_grad():
                temperature.log_ratio.fill_(ratio)
            apart = abs(math.log(float(temperature()) / start) - ratio)
            assert apart <= abs(ratio) / 256 + 1e-6


def test_what_does_not_fit_is_named() -> None:
    x, ids = torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="query and key"):
        contrast(x, x[:1], 0.1)
    with pytest.raises(ValueError, match="no negatives"):
        contrast(x, x, 0.1, Form(in_batch=False))
    with pytest.raises(ValueError, match="queue: vectors"):
        contrast(x, x, 0.1, queue=Keys(x[:, :3], ids))
    with pytest.raises(ValueError, match="query and key"):
        contrast(x, x.double(), 0.1)
    for temperature in (0.0, torch.ones(1)):
        with pytest.raises(ValueError, match="temperature"):
            contrast(x, x, temperature)
    with pytest.raises(ValueError, match="same_text"):
        Form(same_text="masked")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keys: text ids"):
        contrast_with_keys(x, Keys(x, ids.float()), 0, 0.1, ids=ids, total=2)
    with pytest.raises(ValueError, match="queue: text ids"):
        contrast(x, x, 0.1, ids=ids, queue=Keys(x, None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids: text ids"):
        contrast(x, x, 0.1, ids=ids.float())


def _under_ddp(rank: int, world: int, counts: list[int]) -> tuple[float, Tensor]:
    torch_dist.init_process_group("gloo")
    encoder = _encoder()
    parallel = torch.nn.parallel.DistributedDataParallel(encoder)
    first, second = (side[_range(counts, rank)] for side in _texts(sum(counts)))
    queries, keys = parallel(torch.cat([first, second])).chunk(2)
    loss, _ = contrast(queries, keys, 0.1, Form(cosine=True), symmetric=True)
    loss.backward()
    assert encoder.weight.grad is not None
    return float(loss), encoder.weight.grad


def _encoder() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(8, WIDTH, dtype=torch.float64)


def _texts(count: int) -> Tensor:
    return torch.randn(2, count, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_under_torchs_own_data_parallel_every_rank_gets_the_gradient_of_the_whole_batch() -> None:
    counts = [7, 2, 0]
    encoder = _encoder()
    first, second = (encoder(side) for side in _texts(9))
    form = Form(cosine=True)
    loss = oracle.mean_loss(first, second, 0.1, form, ids=torch.zeros(9, 0, dtype=torch.int64), symmetric=True)
    loss.backward()
    for value, gradient in run_ranks(_under_ddp, 3, counts):
        assert value == pytest.approx(float(loss.detach()), rel=1e-12)
        torch.testing.assert_close(gradient, encoder.weight.grad, **EXACT)
