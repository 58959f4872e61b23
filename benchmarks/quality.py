"""Compares what training learns in equal CPU seconds: ours against sentence-transformers on the embedded corpus. Prints
accuracy@1 on the four held-out files over training time, and draws `docs/performance/quality.svg`.
`python -m benchmarks.quality`

All start from the same random weights and read the same sampler's pairs, as many in a step. `ours` trains
`recipes/demo.yaml`, all three losses; `ours, contrast alone` without masked LM. `sentence-transformers` trains
MultipleNegativesRankingLoss in both directions with cosines, in one pass or cached (then in mini-batches of similar
length), with each of the given learning rates and temperatures; its best end counts. Its encoder has the layers up to
our universal layer, or all layers. Both warm up linearly and then decay to zero within the time. Only training steps
count, neither loading nor evaluation. Accuracy is the mean over languages and both directions, with up to `--pairs`
pairs of each language with English.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from torch import nn

from benchmarks.cases import EMBEDDED, ROOT, corpus_of
from benchmarks.processes import Group
from benchmarks.sentences import padded_sides, sentence_model
from infoxlm_ds.build import build, check_inputs
from infoxlm_ds.config import Probe, Recipe
from infoxlm_ds.data.batch import BatchBuilder
from infoxlm_ds.data.corpus import Corpus
from infoxlm_ds.engine.ranks import start_ranks
from infoxlm_ds.model.encoder import SentenceEncoder
from infoxlm_ds.model.pretrained import build_model
from infoxlm_ds.monitor.probe import RetrievalProbe
from infoxlm_ds.reading import load_recipe
from infoxlm_ds.trainer import train_step

FILES = ("home_assistant", "jupyterlab", "kolibri", "wagtail")
FIGURE = ROOT / "docs" / "performance" / "quality.svg"
WARM_UP = 0.07  # of the training, as in the demo
Curve = list[tuple[float, dict[str, float]]]  # CPU seconds of training, and accuracy by file


@dataclass(frozen=True)
class Plan:
    """`marks`: CPU seconds after which accuracy is measured; training ends at the last."""

    recipe: Recipe
    marks: tuple[float, ...]
    pairs: int


class Course:
    """Training that stops at each mark for a measurement."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._spent, recipe = plan, 0.0, plan.recipe
        self._probes = {
            name: RetrievalProbe(
                Probe(data=EMBEDDED / f"{name}.dev.jsonl.xz", pairs=plan.pairs),
                Path(recipe.corpus) / "tokenizer",
                recipe.model.positions,
            )
            for name in FILES
        }

    def run(self) -> Curve:
        curve = []
        for mark in self._plan.marks:
            while self._spent < mark and not self.finished():
                self._spent += self.step()
            encoder = self.encoder()
            scores = {name: probe.run(encoder).scores["probe/mean"] for name, probe in self._probes.items()}
            curve.append((self._spent, scores))
        return curve

    def step(self) -> float:
        """Make a step. Returns its CPU seconds."""
        raise NotImplementedError

    def finished(self) -> bool:
        return False

    def encoder(self) -> SentenceEncoder:
        raise NotImplementedError


class OurCourse(Course):
    def __init__(self, plan: Plan, rank: int, world: int) -> None:
        super().__init__(plan)
        start_ranks()
        self._folder = tempfile.TemporaryDirectory(prefix="infoxlm-")
        run = Path(self._folder.name)
        (run / "model").mkdir()
        recipe = plan.recipe.model_copy(update={"run": run})
        self._state = build(check_inputs(recipe, rank, world))

    def step(self) -> float:
        start = time.process_time()
        assert train_step(self._state)
        return time.process_time() - start

    def pace(self) -> float:
        """CPU seconds of a step, from the fastest half of some."""
        times = sorted(self.step() for _ in range(8))
        return sum(times[:4]) / 4

    def finished(self) -> bool:
        return self._state.step >= self._plan.recipe.optimizer.steps

    def encoder(self) -> SentenceEncoder:
        return self._state.objective.model.sentence_encoder()


class PeerCourse(Course):
    def __init__(self, plan: Plan, cached: bool, layers: int, rate: float, temperature: float, *_: int) -> None:
        super().__init__(plan)
        recipe, corpus = plan.recipe, Corpus(plan.recipe.corpus)
        tokenizer = corpus.manifest.tokenizer
        self._cached, self._lanes, self._pad = cached, range(recipe.batch.lanes), tokenizer.special_ids["pad"]
        self._builder = BatchBuilder(recipe, corpus, list(self._lanes))
        model = recipe.model.model_copy(update={"universal_layer": layers})
        self._ours = build_model(model, tokenizer.vocab_size, recipe.seed, tokenizer.special_ids)
        self._model = sentence_model(self._ours, str(corpus.tokenizer))
        settings: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        kind = (
            partial(CachedMultipleNegativesRankingLoss, mini_batch_size=64) if cached else MultipleNegativesRankingLoss
        )
        self._loss, self._steps, self._rate = kind(self._model, scale=1 / temperature, **settings), 0, rate
        of_recipe = recipe.optimizer
        self._adamw = torch.optim.AdamW(
            self._model.parameters(), betas=of_recipe.betas, weight_decay=of_recipe.weight_decay, fused=True
        )

    def step(self) -> float:
        batches = [self._builder.build(lane, self._steps) for lane in self._lanes]
        features = padded_sides(batches, self._pad, by_length=self._cached)
        self._steps += 1
        start = time.process_time()
        done = self._spent / self._plan.marks[-1]
        for group in self._adamw.param_groups:
            group["lr"] = self._rate * min(max(done, 1e-3) / WARM_UP, (1 - done) / (1 - WARM_UP))
        self._loss(features, torch.empty(0)).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._plan.recipe.optimizer.clip)
        self._adamw.step()
        self._adamw.zero_grad()
        return time.process_time() - start

    def encoder(self) -> SentenceEncoder:
        """Our encoder with the peer's weights, so that both are measured by the same code."""
        body, trained = self._ours.lm.base_model, self._model[0].auto_model
        body.embeddings.load_state_dict(trained.embeddings.state_dict())
        cut = body.encoder.layer[: self._ours.universal_layer]
        cut.load_state_dict(trained.encoder.layer.state_dict())
        return self._ours.sentence_encoder()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="CPU seconds of each training")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--universal-layer", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.04, 0.07])
    parser.add_argument("--marks", type=int, default=5, help="measurements in each training")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = [f"model.layers={options.layers}", f"model.universal_layer={options.universal_layer}"]
    quiet = ["log.every=1000000000", "log.geometry=1000000000", "probe=null", f"corpus={corpus_of('short')}"]
    marks = tuple(options.seconds * (i + 1) / options.marks for i in range(options.marks))
    demo = Plan(load_recipe(ROOT / "recipes" / "demo.yaml", [*shape, *quiet]), marks, options.pairs)
    alone = demo.recipe.model_copy(update={"weights": demo.recipe.weights.model_copy(update={"mmlm": 0.0, "tlm": 0.0})})
    curves: dict[str, Curve] = {}
    print("| | CPU s |", " | ".join(FILES), "| mean |\n|---|---|", "---|" * (len(FILES) + 1))
    for name, recipe in (("ours", demo.recipe), ("ours, contrast alone", alone)):
        curves[name] = _show(name, _train(partial(OurCourse, _paced(replace(demo, recipe=recipe)))))
    peer = replace(demo, recipe=alone)
    for layers in sorted({options.universal_layer, options.layers}):
        for cached in (False, True):
            name = f"sentence-transformers{', cached' * cached}, {layers} layer{'s' * (layers > 1)}"
            grid = itertools.product(options.rates, options.temperatures)
            found = {values: _train(partial(PeerCourse, peer, cached, layers, *values)) for values in grid}
            best = max(found, key=lambda values: _mean(found[values][-1][1]))
            curves[name] = _show(f"{name}, rate {best[0]:g}, temperature {best[1]:g}", found[best])
    _draw(curves, options.figure)


def _paced(plan: Plan) -> Plan:
    """The plan with as many steps as the time allows."""
    with Group() as group:
        (answer,) = group.start(partial(OurCourse, plan))("pace")
    steps = max(20, int(plan.marks[-1] / answer.value))
    changed = {"steps": steps, "warmup": int(WARM_UP * steps)}
    return replace(
        plan, recipe=plan.recipe.model_copy(update={"optimizer": plan.recipe.optimizer.model_copy(update=changed)})
    )


def _train(make: Any) -> Curve:
    with Group() as group:
        (answer,) = group.start(make)("run")
    curve: Curve = answer.value
    return curve


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _show(name: str, curve: Curve) -> Curve:
    for seconds, scores in curve:
        cells = " | ".join(f"{scores[file]:.3f}" for file in FILES)
        print(f"| {name} | {seconds:.0f} | {cells} | {_mean(scores):.3f} |", flush=True)
    return curve


def _draw(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "quality", "svg.fonttype": "none"}  # the same curves give the same file
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        axis.plot([seconds for seconds, _ in curve], [_mean(scores) for _, scores in curve], marker="o", label=name)
    axis.set(xlabel="CPU seconds of training", ylabel="accuracy@1, mean of four files", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
