"""The memory that a recipe needs on each rank: the bytes that exist at each moment of a step.

Legend: V vocabulary, D width, W ranks, M masked rows.

docs/plan.md says where every term comes from and how far it was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from infoxlm_ds.data.batch import N_TEXTS
from infoxlm_ds.losses.masked_lm import rows_of_chunk
from infoxlm_ds.losses.negatives import LARGE_TILES
from infoxlm_ds.planner.workload import Setting

STAGES = (0, 1, 2, 3)
ALLREDUCE = 500_000_000  # elements: MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed's engine


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most. They do not all exist at once: `peak` is the largest sum at any moment, and
    `peak_at` names that moment.

    `gradients`: with those that a backward pass leaves in 16 bits; `optimizer`: with the fp32 masters; `momentum`: the
    copy that computes keys, and the fp32 average; `queue`: with the keys of the step; `logits`: with the gradient of
    the word matrix; `buffers`: DeepSpeed's buckets and the copies that it reduces; `host`: in the host's memory.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    momentum: int
    queue: int
    activations: int
    logits: int
    buffers: int
    peak: int
    peak_at: str
    host: int

    @property
    def resident(self) -> int:
        """Bytes that stay from step to step, without buckets and gradient buffers."""
        return self.weights + self.optimizer + self.momentum + self.queue


def memory(s: Setting) -> Memory:
    """The memory at the setting's stage; docs/plan.md explains each moment."""
    shape, part = s.shape, partition(s)
    grads = _gradients(s, part)
    weights, optimizer, host = _weights(s), (8 if s.stage == 0 else 12) * part.held, 0
    if s.offloaded("param"):
        weights, host = weights - s.element * part.held, s.element * part.held
    if s.offloaded("optimizer"):  # masters, moments, their gradients
        optimizer, host = 0, host + 16 * part.held
    momentum = 0
    if s.has_momentum:
        momentum, average = s.element * (shape.momentum if s.stage < 3 else part.momentum), 4 * part.momentum
        if s.offloaded("optimizer") and s.stage < 3:  # with the masters; stage 3 returns masters on the GPU
            host += average
        elif s.element == 4 and s.stage < 3 and not s.sharded:
            momentum = average  # the weights that compute keys are the average itself
        else:
            momentum += average
    queue, kept, recomputed, logits = _queue(s), _activations(s), _recomputed(s), _logits(s)
    words = s.element * shape.words * (s.trunk > 0)
    moments = _moments(s, grads, kept, recomputed, logits, words)
    at = max(moments, key=lambda name: moments[name])
    return Memory(
        stage=s.stage,
        weights=weights,
        gradients=grads.always + grads.kept + grads.fresh,
        optimizer=optimizer,
        momentum=momentum,
        queue=queue,
        activations=kept + recomputed,
        logits=logits + words,
        buffers=grads.bucket + grads.copies,
        peak=weights + optimizer + momentum + queue + grads.always + moments[at],
        peak_at=at,
        host=host,
    )


def _moments(s: Setting, grads: _Gradients, kept: int, recomputed: int, logits: int, words: int) -> dict[str, int]:
    """Bytes beside the resident ones at each moment: the LM head at the end of a forward pass, the start of the
    backward pass, the embedding at its end, the reduction of gradients, the update of the momentum encoder's weights,
    and the encoding of its keys."""
    shape, several = s.shape, s.accumulation > 1
    released = s.stage == 3 and s.world > 1  # weights are gathered when they are used
    gathered = s.element * min(shape.whole, int(s.zero.max_live_parameters)) * released
    early_bucket = grads.bucket * (several or s.stage == 3)
    left = grads.kept + grads.fresh + grads.bucket
    gathers_keys = s.has_momentum and s.stage < 3 and s.sharded
    # In 16 bits, the word matrix has a gradient from the head and one from the embedding (model/embedding.py). Their
    # sum may be a third buffer.
    word_gradients = words * (2 - (s.element == 4) + (s.stage > 1 or (several and not grads.fresh)))
    return {
        "LM head": (grads.kept + grads.fresh) * several + early_bucket + kept + logits + _head_sums(s) + gathered,
        "backward": grads.kept * several + grads.bucket + kept + recomputed + words + gathered,
        "embedding": left + word_gradients + words * released,
        "reduction": left + grads.copies,
        # Ranks gather their parts: the own one, the same with padding, and those of all ranks.
        "key weights": s.element * partition(s).momentum * (s.world + 2) * gathers_keys,
        "keys": s.recipe.batch.xlco_pairs * s.key_sides * s.text.longest * shape.layer_bytes(s.element),
    }


@dataclass(frozen=True)
class Partition:
    """Elements on the rank that holds most. `held`: of the masters; `touched`: of all parameters that it holds a part
    of, counted whole; `momentum`: of the momentum encoder."""

    held: int
    touched: int
    momentum: int


def partition(s: Setting) -> Partition:
    """Stages 1 and 2 split each optimizer group, as a flat vector, into W equal parts; stage 3 each parameter."""
    shape, world = s.shape, s.world
    if s.stage == 0:
        return Partition(shape.whole, shape.whole, shape.momentum)
    if s.stage == 3:
        parts = [(-(-n // world), copied) for n, copied in shape.matrices + shape.vectors]
        held = sum(n for n, _ in parts)
        return Partition(held, held, sum(n for n, copied in parts if copied))
    held, touched, momentum = 0, [0] * world, [0] * world
    for group in (shape.matrices, shape.vectors):
        size = -(-sum(n for n, _ in group) // (2 * world)) * 2  # DeepSpeed pads to two elements for each rank
        held, start = held + size, 0
        for n, copied in group:
            for rank in range(start // size, (start + n - 1) // size + 1):
                touched[rank] += n
                momentum[rank] += copied * (min(start + n, (rank + 1) * size) - max(start, rank * size))
            start += n
    return Partition(held, max(touched), max(momentum))


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients. `always`: allocated all the time; `kept`: from the first backward pass to the step; `fresh`:
    from one backward pass to the next; `bucket`: DeepSpeed's bucket; `copies`: made by the reduction."""

    always: int
    kept: int
    fresh: int
    bucket: int
    copies: int


def _gradients(s: Setting, part: Partition) -> _Gradients:
    """As DeepSpeed 0.19's optimizers allocate them. A bucket always has its full size, also for a small model."""
    whole, element, sent_in = s.shape.whole, s.element, s.gradient_element
    if s.stage == 0:
        return _Gradients(0, 4 * whole, 0, 0, 4 * min(whole, ALLREDUCE) * (s.world > 1))
    if s.bf16_optimizer:
        copies = 2 * whole * (sent_in == 2) + 4 * whole * (whole <= ALLREDUCE)
        return _Gradients(4 * whole, 0, 2 * whole, 0, copies)
    bucket = int(s.zero.reduce_bucket_size)
    sent = min(whole, bucket)
    if s.stage == 3:
        flat = 0 if s.offloaded("optimizer") else 4 * part.held
        copies = sent_in * (sent + s.shape.words) + (4 * sent // s.world if sent_in == 2 else 0)
        return _Gradients(flat, 0, 0, sent_in * bucket, copies)
    buffers = 1 + bool(s.zero.overlap_comm)
    transit = element * s.shape.words * s.offloaded("optimizer")  # the largest gradient, on its way to the host
    if s.stage == 2:
        kept = 4 * (part.touched if element == 4 else part.held)
        return _Gradients(transit, kept, 0, sent_in * bucket * buffers, sent_in * sent)
    fresh = 0 if element == 4 else element * whole
    # Gradients move into the bucket, and its copy takes their place.
    return _Gradients(transit, 4 * whole, fresh, 4 * bucket * buffers, 2 * sent if sent_in == 2 else 0)


def _weights(s: Setting) -> int:
    if s.stage < 3 or s.world == 1:
        return s.element * s.shape.whole
    small = int(s.zero.param_persistence_threshold)
    persistent = sum(n for n, _ in s.shape.matrices + s.shape.vectors if n <= small)
    return s.element * (partition(s).held + persistent)


def _queue(s: Setting) -> int:
    contrast, batch = s.recipe.contrast, s.recipe.batch
    if not s.recipe.tasks["xlco"]:
        return 0
    keys = _key_bytes(s) * batch.lanes * batch.xlco_pairs * max(s.key_sides, 1)
    return keys + -(-queue_bytes(s) // (s.world if contrast.queue.sharded else 1))


def queue_bytes(s: Setting) -> int:
    """Bytes of the whole queue: each key with its text ids and its step number."""
    contrast = s.recipe.contrast
    used = s.recipe.tasks["xlco"] and contrast.uses_queue
    return (_key_bytes(s) + 8) * contrast.queue.size * used


def _key_bytes(s: Setting) -> int:
    return 4 * s.shape.width + 8 * N_TEXTS[s.recipe.contrast.mixup]


def _activations(s: Setting) -> int:
    """Bytes that a lane's forward pass keeps for backward, with the longest sentences."""
    shape, vector = s.shape, s.element * s.shape.width
    queries = s.of_a_side(s.text.longest)
    parts = [s.of_trunk("mmlm"), s.of_trunk("tlm"), *[queries] * s.query_sides]
    if s.checkpointing:
        kept = vector * sum(part.attended for part in parts)
    else:
        kept = sum(
            shape.attention_bytes(s.element) * part.attended + shape.block_bytes(s.element) * part.finished
            for part in parts
        )
    return round(kept) + vector * _tokens(s)


def _recomputed(s: Setting) -> int:
    """With activation checkpointing, bytes of the one layer that backward computes again."""
    return s.shape.layer_bytes(s.element) * _tokens(s) * s.checkpointing


def _tokens(s: Setting) -> int:
    return s.trunk + s.recipe.batch.xlco_pairs * s.query_sides * s.text.longest


def _logits(s: Setting) -> int:
    """Bytes of a chunk of the LM head or a tile of the contrast: logits of words in the model's precision; logits of
    keys in fp32, and as much again for what is computed of them."""
    shape, batch, contrast = s.shape, s.recipe.batch, s.recipe.contrast
    pairs = batch.lanes * batch.xlco_pairs
    keys = contrast.uses_queue * contrast.queue.size + (contrast.in_batch + contrast.hard_negatives) * pairs
    anchors = batch.xlco_pairs * s.query_sides * (s.accumulation if contrast.keys == "gradient" else 1)
    tile = min(LARGE_TILES[0], anchors) * min(LARGE_TILES[1], keys)
    return max(s.element * min(_chunk(s), _masked(s)) * shape.vocabulary, 8 * tile)


def _head_sums(s: Setting) -> int:
    """Bytes of the word matrix' gradient while the LM head adds it up. Several chunks are added up in fp32."""
    several = _masked(s) > _chunk(s)
    return (s.trunk > 0) * s.shape.words * (4 + s.element if several else s.element)


def _masked(s: Setting) -> int:
    return round(s.masked("mmlm") + s.masked("tlm"))


def _chunk(s: Setting) -> int:
    return rows_of_chunk(s.shape.vocabulary, s.element)


def checkpoint_bytes(s: Setting) -> int:
    """Bytes of one checkpoint, all ranks' files together: masters, moments, averages and the queue."""
    return 12 * s.shape.whole + 4 * s.shape.momentum * s.has_momentum + queue_bytes(s)


def stages(s: Setting) -> Iterator[Setting]:
    """The setting at each stage that supports its precision and offloading."""
    for stage in STAGES:
        if stage == 0 and (s.precision != "fp32" or s.offloaded("optimizer")):
            continue
        if stage < 3 and s.offloaded("param"):
            continue
        yield s.at(stage=stage)


def smallest_world(s: Setting, memory_bytes: float) -> int | None:
    """The smallest number of ranks, of those that divide the lanes, on which this stage fits, or None."""
    return next((world for world in s.recipe.batch.worlds if memory(s.at(world=world)).peak <= memory_bytes), None)
