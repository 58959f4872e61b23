"""The training step as users of Hugging Face transformers write it, and as InfoXLM's own code does.

Peers get the same sequences, masked pieces, pairs, queue and first weights as our step, as padded batches that were
made before. They use transformers' models with scaled dot product attention, torch's AdamW and its clipping. On a GPU
they keep weights in fp32 and compute in bf16 under autocast.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM, PreTrainedModel

from benchmarks.cases import Work
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.model.momentum import momentum_at
from infoxlm_ds.model.pretrained import strip_vocabulary

CPU = torch.device("cpu")
IGNORED = -100  # label of a piece that is not masked


@dataclass(frozen=True)
class Way:
    """How a peer makes its step."""

    masked_head: bool = True  # the head sees masked rows only
    first_layers: bool = True  # the contrast runs the first layers only, in both encoders
    buckets: int = 1  # batches of similar length into which each task's sequences are cut
    one_backward: bool = False  # of the sum of the three losses
    fused: bool = True  # AdamW and the average of the key encoder: fused, or AdamW foreach and a loop over tensors
    reference: bool = False  # a product of zero weight with the vocabulary, a copy of the queue


NAIVE = Way(masked_head=False, first_layers=False, fused=False)
REFERENCE = Way(first_layers=False, fused=False, reference=True)
TUNED = [Way(buckets=buckets, one_backward=one) for buckets in (1, 4) for one in (True, False)]


class Padded(NamedTuple):
    """A batch: ids, mask and labels, [n, longest] each."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Padded:
        return Padded(*(x.to(device) for x in self))


class Task(NamedTuple):
    """A task's sequences in buckets. `order`: the place of each sequence of the buckets in the task."""

    buckets: list[Padded]
    order: Tensor

    def to(self, device: torch.device) -> Task:
        return Task([batch.to(device) for batch in self.buckets], self.order.to(device))


class Items(NamedTuple):
    mmlm: Task
    tlm: Task
    queries: Task
    keys: Task

    def to(self, device: torch.device) -> Items:
        return Items(*(task.to(device) for task in self))


def items_of(lane: JointBatch, pad: int, buckets: int) -> Items:
    """The sequences of a joint batch as padded batches."""
    ids = lane.tokens.ids
    labels = torch.full_like(ids, IGNORED)
    labels[lane.rows] = lane.labels
    lengths = lane.tokens.layout.lengths.tolist()
    sequences = list(zip(ids.split(lengths), labels.split(lengths), strict=True))
    mmlm, trunk = len(lane.names["mmlm"]), len(lane.trunk.lengths)
    assert lane.keys is not None
    keys = lane.keys.ids.split(lane.keys.layout.lengths.tolist())
    parts = (sequences[:mmlm], sequences[mmlm:trunk], sequences[trunk:], [(key, key) for key in keys])
    return Items(*(_task(part, pad, buckets) for part in parts))


def _task(sequences: Sequence[tuple[Tensor, Tensor]], pad: int, buckets: int) -> Task:
    order = torch.tensor([len(ids) for ids, _ in sequences]).argsort(stable=True)
    if buckets == 1:
        order = torch.arange(len(sequences))
    padded = []
    for part in order.tensor_split(min(buckets, len(order))):
        rows, labels = zip(*(sequences[i] for i in part), strict=True)
        ids = pad_sequence(list(rows), batch_first=True, padding_value=pad)
        filled = pad_sequence(list(labels), batch_first=True, padding_value=IGNORED)
        padded.append(Padded(ids, pad_sequence([torch.ones_like(x) for x in rows], batch_first=True), filled))
    return Task(padded, order)


class Peer:
    """A peer's model, key encoder, optimizer and queue. `ways`: how it makes its steps, by name."""

    def __init__(
        self,
        work: Work,
        ways: dict[str, Way],
        rank: int,
        world: int,
        device: torch.device = CPU,
        autocast: bool = False,
        attention: str = "sdpa",
    ) -> None:
        """`attention`: the name of one of transformers' implementations."""
        recipe, self._ways, self._device, self._autocast = work.recipe, ways, device, autocast
        self._schedule, self._temperature = recipe.contrast.momentum, recipe.contrast.temperature
        self._layer, self._clip = recipe.model.universal_layer, recipe.optimizer.clip
        assert work.model.head.projection is not None and work.queue is not None
        self._model = _plain_model(work.model.lm, attention, device)
        self._projection = copy.deepcopy(work.model.head.projection).to(device)
        first = next(iter(ways.values()))
        self._query = _first_layers(self._model, self._layer) if first.first_layers else self._model
        self._key = copy.deepcopy(nn.ModuleList([self._query, self._projection])).requires_grad_(False)
        trained = nn.ModuleList([self._model, self._projection])
        self._parameters = list(trained.parameters())
        followed = nn.ModuleList([self._query, self._projection])
        self._pairs = list(self._key.parameters()), list(followed.parameters())
        settings = recipe.optimizer
        self._adamw = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=first.fused,
            foreach=not first.fused,
        )
        self._queue, self._place = work.queue.vectors.to(device, copy=True), 0
        pad = work.corpus.manifest.tokenizer.special_ids["pad"]
        self._items = {
            way: [items_of(lanes[0], pad, way.buckets).to(device) for lanes in work.batches]
            for way in set(ways.values())
        }
        self._whole, self._first_queue = nn.ModuleList([trained, self._key]), work.queue.vectors
        self._first = {name: x.clone() for name, x in self._whole.state_dict().items()} if len(ways) > 1 else {}
        self._steps = Counter[Way]()  # each way takes the batches in turn
        self._losses: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        """`step` for a peer of one way, otherwise a step by the way's name."""
        way = self.__dict__.get("_ways", {}).get(name)
        if way is None:
            raise AttributeError(name)
        return lambda: self._step(way)

    def restart(self) -> None:
        """Back to the first weights and queue, so that another way can make step 1."""
        self._whole.load_state_dict(self._first)
        self._queue.copy_(self._first_queue)

    def losses(self) -> dict[str, float]:
        return self._losses

    def _step(self, way: Way) -> None:
        items = self._items[way][self._steps[way] % len(self._items[way])]
        self._steps[way] += 1
        waiting, self._losses = [], {}
        with self._precision():
            keys = self._keys(items.keys, way)
        for name, loss in self._each_loss(items, keys, way):
            if way.one_backward:
                waiting.append(loss)
            else:
                loss.backward()
            self._losses[name] = loss.detach().item()
        if waiting:
            torch.stack(waiting).sum().backward()
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._adamw.step()
        self._adamw.zero_grad()
        self._follow(way)
        self._queue[self._place : self._place + len(keys)] = keys
        self._place = (self._place + len(keys)) % len(self._queue)

    def _each_loss(self, items: Items, keys: Tensor, way: Way) -> Iterator[tuple[str, Tensor]]:
        for name, task in (("mmlm", items.mmlm), ("tlm", items.tlm)):
            with self._precision():
                loss = self._masked_lm(task, way)
            yield name, loss
        with self._precision():
            loss = self._contrast(items.queries, keys, way)
        yield "xlco", loss

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)

    def _masked_lm(self, task: Task, way: Way) -> Tensor:
        if not way.masked_head:
            (batch,) = task.buckets
            loss: Tensor = self._model(batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
            return loss
        sums, count = [], 0
        for batch in task.buckets:
            states = self._model.base_model(batch.ids, attention_mask=batch.mask).last_hidden_state
            masked = batch.labels != IGNORED
            logits = self._model.lm_head(states[masked])
            sums.append(cross_entropy(logits, batch.labels[masked], reduction="sum"))
            count += int(masked.sum())
        return torch.stack(sums).sum() / count

    def _contrast(self, task: Task, keys: Tensor, way: Way) -> Tensor:
        query = self._sentences(self._query, self._projection, task, way, touch=way.reference)
        queue = self._queue.clone() if way.reference else self._queue
        logits = torch.cat([(query * keys).sum(1, keepdim=True), query @ queue.t()], 1) / self._temperature
        return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=self._device))

    @torch.no_grad()
    def _keys(self, task: Task, way: Way) -> Tensor:
        encoder, projection = self._key
        return self._sentences(encoder, projection, task, way, touch=False)

    def _sentences(self, encoder: Any, projection: Any, task: Task, way: Way, touch: bool) -> Tensor:
        """Projected [CLS] states of the universal layer."""
        found = []
        for batch in task.buckets:
            if way.first_layers:
                state = encoder(batch.ids, attention_mask=batch.mask).last_hidden_state[:, 0]
            else:
                body = encoder.base_model(batch.ids, attention_mask=batch.mask, output_hidden_states=True)
                state = body.hidden_states[self._layer][:, 0]
            vectors = projection(state)
            if touch:  # so that every parameter has a gradient in this pass too
                vectors = vectors + 0 * encoder.lm_head(body.last_hidden_state[:, 0]).sum()
            found.append(vectors)
        rows = torch.cat(found)
        return torch.empty_like(rows).index_copy(0, task.order, rows)

    @torch.no_grad()
    def _follow(self, way: Way) -> None:
        weight = 1 - momentum_at(self._schedule, self._steps[way])
        keys, queries = self._pairs
        if way.fused:
            torch._foreach_lerp_(list(keys), list(queries), weight)
            return
        for key, query in zip(keys, queries, strict=True):
            key.mul_(1 - weight).add_(query, alpha=weight)


def _plain_model(lm: PreTrainedModel, attention: str, device: torch.device) -> PreTrainedModel:
    """The same weights in a model that transformers makes for its users."""
    stripped = strip_vocabulary(copy.deepcopy(lm))
    config = copy.deepcopy(stripped.config)
    with device:
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    model.load_state_dict(stripped.state_dict())
    return model.train()


def _first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The encoder with its first layers only. It shares the model's weights."""
    body = model.base_model
    config = copy.deepcopy(body.config)
    config.num_hidden_layers = layers
    cut: PreTrainedModel = type(body)(config, add_pooling_layer=False)
    cut.embeddings = body.embeddings
    cut.encoder.layer = body.encoder.layer[:layers]
    return cut.train()
