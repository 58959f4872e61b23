"""What a step costs: floating-point operations of each loss, bytes that a rank sends, tokens.

Legend: W ranks. A multiplication and an addition count as two operations.
"""

from __future__ import annotations

from infoxlm_ds.data.batch import N_TEXTS
from infoxlm_ds.planner.memory import partition
from infoxlm_ds.planner.workload import Passes, Setting


def flops(s: Setting) -> dict[str, float]:
    """Operations of a step, all lanes, forward and backward: without padding, LM head on masked rows only, universal
    layer and below for the contrast, last layers only for rows that are read. `recomputed` comes on top: passes without
    a graph, activation checkpointing."""
    bodies = {
        "mmlm": sum(_forward(s, s.of_trunk("mmlm"), s.text.block)),
        "tlm": sum(_forward(s, s.of_trunk("tlm"), s.text.pair)),
    }
    of_a_side = sum(_forward(s, s.of_a_side(s.text.mean), s.text.mean))
    queries, keys = s.query_sides * of_a_side, s.key_sides * of_a_side
    operations = {task: 3 * body + _head(s, task) for task, body in bodies.items()}
    operations |= {"xlco queries": 3 * queries, "xlco keys": keys, "xlco logits": _logits(s)}
    operations["recomputed"] = queries * s.encodes_twice + (sum(bodies.values()) + queries) * s.checkpointing
    return operations


def body_operations(s: Setting) -> tuple[float, float]:
    """Operations of a step in the layers' matrix products and in attention, recomputed ones included."""
    mmlm, tlm = _forward(s, s.of_trunk("mmlm"), s.text.block), _forward(s, s.of_trunk("tlm"), s.text.pair)
    side, again = _forward(s, s.of_a_side(s.text.mean), s.text.mean), 3 + s.checkpointing
    sides = s.query_sides * (again + s.encodes_twice) + s.key_sides
    matrices, attention = (again * (m + t) + sides * x for m, t, x in zip(mmlm, tlm, side, strict=True))
    return matrices, attention


def head_operations(s: Setting) -> float:
    """Operations of a step in the masked LM head."""
    return _head(s, "mmlm") + _head(s, "tlm")


def _forward(s: Setting, passes: Passes, length: float) -> tuple[float, float]:
    """Operations of all lanes' forward passes: in matrix products, and in attention over sequences of this length."""
    width, lanes = s.shape.width, s.recipe.batch.lanes
    matrices = 6 * width**2 * passes.attended + (2 * width**2 + 4 * width * s.shape.feed_forward) * passes.finished
    return lanes * matrices, lanes * 4 * width * length * passes.attended


def _head(s: Setting, task: str) -> float:
    return 3 * s.recipe.batch.lanes * s.masked(task) * 2 * (s.shape.width**2 + s.shape.words)


def useful(s: Setting) -> float:
    """Operations of a step without those that are computed a second time."""
    return sum(n for name, n in flops(s).items() if name != "recomputed")


def _logits(s: Setting) -> float:
    """Logits and the mean key under their softmax; with trained keys, the same again for the gradient of the keys."""
    contrast, pairs = s.recipe.contrast, s.recipe.batch.lanes * s.recipe.batch.xlco_pairs
    if not s.recipe.tasks["xlco"]:
        return 0.0
    rows = pairs * (1 + contrast.symmetric)
    in_batch = contrast.in_batch * pairs * (2 if contrast.keys == "gradient" else 1)
    return 4.0 * s.shape.width * rows * (in_batch + contrast.uses_queue * contrast.queue.size)


def wire(s: Setting) -> dict[str, float]:
    """Bytes that a rank sends in a step, with ring algorithms: 2 n (W - 1) / W for an all-reduce of n bytes, and n (W -
    1) / W for an all-gather or reduce-scatter of n bytes in all."""
    shape, batch, contrast = s.shape, s.recipe.batch, s.recipe.contrast
    fraction, element, lanes = (s.world - 1) / s.world, s.element, batch.lanes
    small = int(s.zero.param_persistence_threshold)
    cut = sum(n for n, _ in shape.matrices + shape.vectors if n > small)
    times = s.accumulation if s.stage >= 2 else 1  # from stage 2 on, each micro-step reduces
    # Stage 3 gathers released weights; above `max_live_parameters` it gathers them again for the backward pass.
    gathers = s.accumulation * (1 if shape.whole <= s.zero.max_live_parameters else 2)
    weights = {0: 0, 3: element * (gathers * cut + shape.whole - cut)}.get(s.stage, element * shape.whole)
    if s.stage == 3 and s.encodes_twice:  # an upper bound: DeepSpeed releases weights after the pass without a graph
        weights += 2 * s.accumulation * element * shape.momentum
    sent = {
        "gradients": (1 if s.stage == 3 else 2) * fraction * times * s.gradient_element * shape.whole,
        "weights": fraction * weights,
        "key weights": 0.0,
        "keys": 0.0,
        "queue": 0.0,
    }
    if s.has_momentum:
        # Below stage 3, ranks exchange their averages, padded to the largest part.
        sent["key weights"] = {0: 0.0, 3: fraction * element * shape.momentum * s.accumulation}.get(
            s.stage, fraction * element * s.world * partition(s).momentum
        )
    if s.recipe.tasks["xlco"]:
        pairs, sides = lanes * batch.xlco_pairs, s.key_sides or s.query_sides + contrast.uses_queue
        width = 4 if s.recipe.model.normalize or contrast.keys == "gradient" else element
        sent["keys"] = fraction * pairs * (sides * width * shape.width + 8 * N_TEXTS[contrast.mixup])
        if contrast.uses_queue and contrast.queue.sharded:
            # All ranks get the anchors; their sums over the negatives are reduced.
            rows = pairs * (1 + contrast.symmetric)
            sent["queue"] = fraction * rows * 4 * shape.width * 3
    return sent


def tokens_per_step(s: Setting) -> float:
    """Tokens of text in a step, both sides and hard negatives of each pair, with special tokens: the mean of what
    `speed/tokens` counts (`JointBatch.text_tokens`)."""
    pairs = s.recipe.batch.xlco_pairs * s.recipe.tasks["xlco"]
    texts = 2 + s.recipe.contrast.hard_negatives
    return s.recipe.batch.lanes * (s.trunk + texts * pairs * s.text.mean)
