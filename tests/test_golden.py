"""It is InfoXLM: consecutive training steps of the reference implementation, replayed to its stated tolerances.

`tests/golden/README.md` says what the files hold. GOLDEN_DIR may name a folder with more steps; every step file in it
is replayed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from infoxlm_ds.config import Recipe
from infoxlm_ds.data.batch import JointBatch, Sides
from infoxlm_ds.data.flat_batch import FlatBatch, flat_batch, make_layout
from infoxlm_ds.losses.contrast import Keys
from infoxlm_ds.losses.queue import KeyQueue
from infoxlm_ds.model.encoder import InfoXLM
from infoxlm_ds.model.heads import masked_lm_losses
from infoxlm_ds.model.momentum import Fragment, MomentumEncoder, WriteWhole
from infoxlm_ds.model.pretrained import build_model, strip_vocabulary
from infoxlm_ds.objective import Objective

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
STEPS = sorted(GOLDEN.glob("tiny_step[0-9]*.safetensors"))
HIDDEN = Path(__file__).parent / "golden" / "tiny_hidden.safetensors"
# The reference keeps a key encoder with all layers and a head, and uses two layers.
UNUSED = re.compile(r"after\.model_slow\.(decoder\.sentence_encoder\.layers\.[23]\.|.*lm_head)")
PAD, NOT_MASKED = 1, 1
RECIPE = Recipe.model_validate(
    {
        "run": "unused",
        "corpus": "unused",
        "engine": "unused",
        "model": {"layers": 4, "width": 64, "heads": 4, "feed_forward": 128, "positions": 64, "universal_layer": 2},
        "contrast": {"temperature": 0.25, "queue": {"size": 24}, "momentum": 0.97, "same_text": "ignore"},
        "batch": {"lanes": 1, "mmlm_tokens": 1, "tlm_tokens": 1, "xlco_pairs": 1},
        "reduction": "reference",
        "optimizer": {"learning_rate": 1e-3, "steps": 100, "warmup": 2},
    }
)


class Names:
    """The reference's parameter names, mapped to ours."""

    def __init__(self) -> None:
        self._map = json.loads((GOLDEN / "mapping.json").read_text())["map"]

    def ours(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """{name in XLMRobertaForMaskedLM: tensor} of the tensors under `prefix`."""
        return {self._map[k.removeprefix(prefix)]: v for k, v in tensors.items() if k.startswith(prefix)}


class FairseqAdam:
    """Adam with eps beside the uncorrected second moment and decay of everything, as the reference trains."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self._step = 0

    def step(self, lr: float) -> None:
        self._step += 1
        b1, b2, eps, decay = 0.9, 0.98, 1e-6, 0.01
        for p, first, second in self._moments:
            assert p.grad is not None
            first.mul_(b1).add_(p.grad, alpha=1 - b1)
            second.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            p.data.mul_(1 - decay * lr)
            size = lr * (1 - b2**self._step) ** 0.5 / (1 - b1**self._step)
            p.data.addcdiv_(first, second.sqrt() + eps, value=-size)


class Replay:
    """The reference's state, in our objects."""

    def __init__(self) -> None:
        names, init = Names(), load_file(GOLDEN / "tiny_init_fairseq.safetensors")
        self.model = _model(names.ours(init, "model_fast."), init["proj_matrix_fast"][0])
        slow = _model(names.ours(init, "model_slow."), init["proj_matrix_slow"][0])
        self.objective = Objective(RECIPE, self.model)
        self.queue = KeyQueue(24, 64, 2, torch.device("cpu"))
        self.key = MomentumEncoder(
            self.model.sentence_encoder(),
            copy.deepcopy(self.model.sentence_encoder()).requires_grad_(False),
            _masters,
            partial(WriteWhole, sharded=False),
            RECIPE.contrast.momentum,
        )
        for ours, theirs in zip(self.key.shadow, _masters(list(slow.sentence_encoder().parameters())), strict=True):
            ours.values.copy_(theirs.values)
        self.key.write()
        self.adam = FairseqAdam([p for p in self.model.parameters() if p is not self.untrained])

    @property
    def untrained(self) -> Tensor:
        """The reference has no token types; ours stay zero."""
        return self.model.lm.roberta.embeddings.token_type_embeddings.weight

    def fill(self) -> None:
        fill = load_file(GOLDEN / "tiny_fill.safetensors")
        for n in range(3):
            keys = self.key.encode(_flat(fill[f"fill{n}.xlco.key_tokens"]))
            torch.testing.assert_close(keys, fill[f"fill{n}.keys"], atol=5e-6, rtol=0)
            self.queue.push(Keys(keys, torch.zeros(len(keys), 2, dtype=torch.int64)), 0)
            torch.testing.assert_close(
                self.queue.vectors[: self.queue.pushed],
                fill[f"fill{n}.queue_after"][: self.queue.pushed],
                atol=5e-6,
                rtol=0,
            )
            assert self.queue.pushed % 24 == int(fill[f"fill{n}.ptr_after"])


@pytest.fixture(scope="module")
def replayed() -> list[tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]]:
    """For each step file: what it says, what json says, and what our objects held (gradients, losses, state)."""
    replay = Replay()
    replay.fill()
    stated = {entry["step"]: entry for entry in json.loads((GOLDEN / "tiny_steps.json").read_text())}
    return [_replay_step(replay, load_file(path), stated[n]) for n, path in enumerate(STEPS, start=1)]


def test_the_steps_are_consecutive_and_nothing_that_they_state_is_left_out(replayed: list) -> None:  # type: ignore[type-arg]
    assert [path.stem for path in STEPS] == [f"tiny_step{n}" for n in range(1, max(3, len(STEPS)) + 1)]
    for golden, _, ours in replayed:
        left_out = {name for name in golden if name.startswith(("grad_sum.", "after."))}
        left_out -= {name.replace("grad.", "grad_sum.", 1) for name in ours} | {"after.queue_ptr", "after.enqueue_cnt"}
        assert all(UNUSED.match(name) for name in left_out), sorted(left_out)


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[p.stem for p in STEPS])
def test_a_step_of_the_reference_is_reproduced(number: int, replayed: list) -> None:  # type: ignore[type-arg]
    golden, stated, ours = replayed[number]
    for name, value in ours.items():
        if name.startswith("grad."):
            expected = golden[name.replace("grad.", "grad_sum.", 1)]
            atol = 5e-5 * float(expected.abs().max())
            if not name.endswith("k_proj.bias"):  # mathematically zero: noise
                torch.testing.assert_close(value, expected, atol=atol, rtol=0, msg=name)
        elif name.startswith("after."):
            torch.testing.assert_close(value, golden[name], atol=2e-6, rtol=0, msg=name)
        elif name.endswith("xlco_loss_sum"):
            torch.testing.assert_close(value, golden[name], rtol=2e-6, atol=0)
    assert int(ours["pointer"]) == stated["queue_ptr_after"]
    assert int(ours["pushed"]) == stated["enqueue_cnt_after"]
    assert float(ours["norm"]) == pytest.approx(stated["gnorm_after_norm_before_clip"], rel=5e-5)


def test_the_encoder_gives_the_hidden_states_of_the_reference() -> None:
    golden, replay = load_file(HIDDEN), Replay()
    body = replay.model.body

    for name in ("mlm", "tlm"):
        batch = _flat(golden[f"{name}.input"])
        hidden = body.embed(batch)
        for depth in range(5):
            torch.testing.assert_close(hidden, golden[f"{name}.hidden"][depth], atol=5e-6, rtol=0)
            hidden = body.run(hidden, batch.layout, depth, depth + 1)


def _replay_step(replay: Replay, golden: dict[str, Tensor], stated: dict):  # type: ignore[no-untyped-def, type-arg]
    micros = [_joint(golden, f"micro{j}.") for j in range(stated["n_micro"])]
    total = sum(sum(m.counts.values()) for m in micros)
    assert 1 / total == pytest.approx(stated["grad_multiplier"])
    ours: dict[str, Tensor] = {}
    masked_lm = 0.0
    replay.model.zero_grad()
    for j, micro in enumerate(micros):
        context = replay.objective.prepare([micro], replay.key, replay.queue.view())
        if len(micros) == 1:
            assert set(context.denominators.values()) == {total}
        context = dataclasses.replace(context, denominators=dict.fromkeys(context.denominators, total))
        torch.testing.assert_close(replay.queue.vectors, golden[f"micro{j}.queue_used"], atol=5e-6, rtol=0)
        losses, report, reps = replay.objective(micro, context, 0)
        torch.testing.assert_close(reps.first, golden[f"micro{j}.q"], atol=1e-5, rtol=0)
        torch.stack(list(losses.values())).sum().backward()
        ours[f"micro{j}.xlco_loss_sum"] = torch.as_tensor(report.sums["xlco/loss"])
        masked_lm += float(report.sums["mmlm/loss"]) + float(report.sums["tlm/loss"])
        replay.queue.push(
            replay.objective.second_sides(context, [micro], [reps]), stated["step"]
        )  # the reference pushes here
    n_masked = sum(len(m.labels) for m in micros)  # the reference logs the two together, in bits
    assert masked_lm / n_masked / math.log(2) == pytest.approx(stated["log"]["mlm_loss"], rel=2e-6)
    ours |= _reference_names(replay, "grad.", lambda p: p.grad * total)
    trained = [p for p in replay.model.parameters() if p is not replay.untrained]
    norm = torch.nn.utils.clip_grad_norm_(trained, stated["clip_norm"])
    replay.adam.step(stated["lr"])
    replay.key.update(1)
    ours |= _reference_names(replay, "after.", lambda p: p.detach().clone())
    ours |= {f"after.{k}": v for k, v in _key_names(replay).items()}
    ours["after.queue"] = replay.queue.vectors.clone()
    ours |= {
        "norm": norm,
        "pushed": torch.tensor(replay.queue.pushed),
        "pointer": torch.tensor(replay.queue.pushed % 24),
    }
    return golden, stated, ours


def _reference_names(replay: Replay, prefix: str, of):  # type: ignore[no-untyped-def]
    parameters = dict(replay.model.lm.named_parameters(remove_duplicate=False))
    out = {f"{prefix}model_fast.{theirs}": of(parameters[ours]) for theirs, ours in Names()._map.items()}
    assert replay.model.head.projection is not None
    return out | {f"{prefix}proj_matrix_fast": of(replay.model.head.projection.weight).t()[None]}


def _key_names(replay: Replay) -> dict[str, Tensor]:
    """The key encoder's tensors: embeddings, two layers, projection."""
    key = replay.key.encoder
    by_name = {f"roberta.embeddings.{n}": p.clone() for n, p in key.body.embeddings.named_parameters()}
    by_name |= {f"roberta.encoder.layer.{n}": p.clone() for n, p in key.body.layers.named_parameters()}
    out = {f"model_slow.{theirs}": by_name[ours] for theirs, ours in Names()._map.items() if ours in by_name}
    assert len(out) == 4 + 2 * 16 and key.head.projection is not None
    return out | {"proj_matrix_slow": key.head.projection.weight.t()[None].clone()}


def _model(weights: dict[str, Tensor], projection: Tensor) -> InfoXLM:
    model = build_model(RECIPE.model, 1000, seed=0)
    lm = strip_vocabulary(model.lm)
    missing, unexpected = lm.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) == {
        "roberta.embeddings.token_type_embeddings.weight",
        "lm_head.decoder.weight",
        "lm_head.decoder.bias",
    }
    lm.roberta.embeddings.token_type_embeddings.weight.data.zero_()
    assert model.head.projection is not None
    model.head.projection.weight.data.copy_(projection.t())  # the reference multiplies from the left
    return model


def _masters(parameters: object) -> list[Fragment]:
    return [Fragment(i, 0, p.detach().flatten()) for i, p in enumerate(parameters)]  # type: ignore[arg-type, var-annotated]


def _flat(*padded: Tensor) -> FlatBatch:
    """Padded sequences [S, L], of one kind behind the other."""
    ids = torch.cat([x[x != PAD] for x in padded])
    return flat_batch(ids.numpy(), torch.cat([(x != PAD).sum(1) for x in padded]).numpy())


def _joint(golden: dict[str, Tensor], prefix: str) -> JointBatch:
    """One micro-batch of the reference as a joint batch."""
    inputs, rows, labels, shift = [], [], [], 0
    for task in ("mlm", "tlm"):
        padded, target = golden[f"{prefix}{task}.input"], golden[f"{prefix}{task}.target"]
        inputs.append(padded)
        flat = target[padded != PAD]
        rows.append(torch.nonzero(flat != NOT_MASKED)[:, 0] + shift)
        labels.append(flat[flat != NOT_MASKED])
        shift += len(flat)
    query = golden[f"{prefix}xlco.query_tokens"]
    pairs = len(query)
    return JointBatch(
        tokens=_flat(*inputs, query),
        trunk=_flat(*inputs).layout,
        queries=_flat(query).layout,
        sides=Sides(pairs, 0, 0),
        keys=_flat(golden[f"{prefix}xlco.key_tokens"]),
        key_sides=Sides(0, pairs, 0),
        rows=torch.cat(rows),
        labels=torch.cat(labels),
        mmlm=len(labels[0]),
        text_ids=torch.zeros(pairs, 2, dtype=torch.int64),
        hard_ids=torch.zeros(0, 2, dtype=torch.int64),
        names={"xlco": np.full((pairs, 1), "one-other")},
        text_tokens=0,
    )


def test_the_model_equals_transformers_on_the_reference_weights() -> None:
    """Loss, hidden states and gradients of the reference's first MMLM batch, padded in transformers and flat here."""
    replay, golden = Replay(), load_file(STEPS[0])
    padded, target = golden["micro0.mlm.input"], golden["micro0.mlm.target"]
    twin = _model(
        Names().ours(load_file(GOLDEN / "tiny_init_fairseq.safetensors"), "model_fast."), torch.zeros(64, 64)
    ).lm
    twin.set_attn_implementation("sdpa")
    labels = target.masked_fill(target == NOT_MASKED, -100)
    expected = twin(input_ids=padded, attention_mask=padded != PAD, labels=labels, output_hidden_states=True)
    expected.loss.backward()

    real = padded != PAD
    tokens = _flat(padded)
    (rows,) = torch.nonzero(target[real] != NOT_MASKED, as_tuple=True)
    states, _ = replay.model(tokens, tokens.layout, make_layout(np.zeros(0, np.int64)), rows)
    weights = torch.full((len(rows),), 1 / len(rows))
    weighted, _ = masked_lm_losses(replay.model.lm, states, target[real][rows], weights)
    loss = weighted.sum()
    loss.backward()

    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(states, expected.hidden_states[-1][real][rows], atol=1e-5, rtol=0)
    ours = dict(replay.model.lm.named_parameters())
    for name, parameter in twin.named_parameters():
        if not name.endswith("attention.self.key.bias"):  # mathematically zero: noise
            largest = float(parameter.grad.abs().max())
            torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-5 * largest, rtol=1e-5, msg=name)
