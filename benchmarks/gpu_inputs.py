"""The recipes that `make gpu` runs, and their batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.cases import ROOT, SpreadCorpus
from benchmarks.gpu_report import Part
from infoxlm_ds.build import Inputs, check_inputs
from infoxlm_ds.config import Recipe
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.engine.config import dtype_of
from infoxlm_ds.model.attention import why_not_varlen
from infoxlm_ds.model.pretrained import head_width
from infoxlm_ds.reading import load_recipe

VOCABULARY = 250_002  # XLM-R's
SHAPES = {  # of XLM-R, with random weights: there is no hub
    "base": {"layers": 12, "width": 768, "heads": 12, "feed_forward": 3072, "positions": 512},
    "large": {"layers": 24, "width": 1024, "heads": 16, "feed_forward": 4096, "positions": 512},
}
TINY = [
    "model={layers: 2, width: 32, heads: 2, feed_forward: 64, positions: 128, universal_layer: 1}",
    "batch={lanes: 2, mmlm_tokens: 60, tlm_tokens: 110, xlco_pairs: 6}",
    "contrast.queue={size: 40}",
]
LANES = {"base": 2, "large": 4}  # what each of eight GPUs runs of the recipe's lanes
# A lane of which a peer's logits of all positions may fit into a GPU: 10 GB in bf16, and what is computed of them.
SMALL_LANE = ("batch.lanes=1", "batch.mmlm_tokens=16384", "batch.tlm_tokens=4096", "batch.xlco_pairs=32")


def vocabulary(part: Part) -> int:
    return 1_000 if part.tiny else VOCABULARY


def recipe_of(part: Part, name: str, run: Path, small_lane: bool = False) -> Recipe:
    """recipes/base.yaml or large.yaml for one GPU, with random weights."""
    shape = [f"model.{key}={value}" for key, value in SHAPES[name].items()]
    batch = SMALL_LANE if small_lane else (f"batch.lanes={LANES[name]}",)
    if part.tiny:
        shape, batch = TINY, (f"batch.lanes={1 if small_lane else 2}",)
    overrides = ["model.init=null", *shape, *batch, "probe=null"]
    paths = [f"run={run}", f"corpus={part.corpus}", f"engine={ROOT / 'ds_configs' / 'zero1_bf16.json'}"]
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides + paths)


def inputs_of(part: Part, recipe: Recipe) -> Inputs:
    """The recipe's inputs, with pieces that are spread over the vocabulary."""
    (recipe.run / "model").mkdir(parents=True, exist_ok=True)
    inputs = check_inputs(recipe, 0, 1)
    corpus = SpreadCorpus(recipe.corpus, vocabulary(part))
    loader = Loader(recipe, corpus, 0, 1, varlen=runs_varlen(part, inputs))
    return replace(inputs, corpus=corpus, loader=loader)


def runs_varlen(part: Part, inputs: Inputs) -> bool:
    width = head_width(inputs.identity.recipe.model)
    return why_not_varlen(part.device, dtype_of(inputs.identity.engine), width) is None
