"""The contrast computed from its definition: float64, one process, whole matrices, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from infoxlm_ds.losses.contrast import Form, Keys


def mean_loss(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    form: Form,
    *,
    ids: Tensor,
    queue: Keys | None = None,
    hard: Keys | None = None,
    symmetric: bool = False,
) -> Tensor:
    """The mean over all pairs, in one direction or in both. 0 if there are no pairs."""
    if form.cosine:
        query, key = normalize(query, dim=1), normalize(key, dim=1)
        queue = queue and Keys(normalize(queue.vectors, dim=1), queue.ids)
        hard = hard and Keys(normalize(hard.vectors, dim=1), hard.ids)
    rows = [_rows(query, key, temperature, form, ids, queue, hard)]
    if symmetric:
        rows.append(_rows(key, query, temperature, form, ids, queue, None))
    return torch.cat(rows).sum() / max(1, sum(map(len, rows)))


def _rows(
    anchor: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    form: Form,
    ids: Tensor,
    queue: Keys | None,
    hard: Keys | None,
) -> Tensor:
    scores = anchor @ target.t() / temperature
    own = scores.diagonal()
    logits, negative, positive = [], [], []
    blocks = [(Keys(target, ids), form.in_batch, True), (hard, True, False), (queue, True, True)]
    for number, (keys, used, attracts) in enumerate(blocks):
        if keys is None or not used:
            continue
        score = anchor @ keys.vectors.t() / temperature
        same = share(ids, keys.ids) & (form.same_text != "ignore")
        is_own = torch.eye(len(anchor), dtype=torch.bool) if number == 0 else torch.zeros_like(same)
        candidates = ~same & ~is_own
        if form.drop_within is not None:
            candidates &= score.detach() < (own - form.drop_within / temperature).detach()[:, None]
        logits.append(score)
        negative.append(candidates)
        positive.append(same & ~is_own & (attracts and form.same_text == "positive"))
    all_logits, negatives, positives = (torch.cat(parts, 1) for parts in (logits, negative, positive))
    any_negative = negatives.any(1)
    # A row without negatives has no loss; the second `where` keeps its gradient from being nan.
    safe = torch.where(negatives | ~any_negative[:, None], all_logits, -torch.inf)
    log_sum = safe.logsumexp(1)
    margin = form.margin / temperature
    losses = softplus(log_sum - own + margin, threshold=100)
    extra = torch.where(positives, softplus(log_sum[:, None] - all_logits + margin, threshold=100), 0.0).sum(1)
    return torch.where(any_negative, (losses + extra) / (1 + positives.sum(1)), 0.0)


def share(a: Tensor, b: Tensor) -> Tensor:
    """Whether items have a text id in common, [len(a), len(b)]."""
    if a.shape[1] == 0 or b.shape[1] == 0:
        return torch.zeros(len(a), len(b), dtype=torch.bool)
    return (a[:, None, :, None] == b[None, :, None, :]).any(-1).any(-1)
