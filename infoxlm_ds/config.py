"""The typed tree a recipe is checked against: defaults < recipe file < `key.path=value` of the command line.

A key that is not here is an error that names it. The tree is frozen: what a run was started with is what it has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Pooling = Literal["cls", "mean"]
T = TypeVar("T", bound=BaseModel)


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do. The commands exit with code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The encoder's shape (XLM-R's own names and meanings) and where its sentence representations come from."""

    init: str | None = None  # a Hugging Face folder or a name on its hub; its shape then wins over the next six
    type: Literal["xlm-roberta", "xlm-roberta-xl", "bert", "modernbert"] = "xlm-roberta"
    layers: Positive = 12
    width: Positive = 768
    heads: Positive = 12
    feed_forward: Positive = 3072
    positions: Positive = 512
    universal_layer: Positive = 8  # InfoXLM, section 4.1: the contrast reads the output of this many layers
    pooling: Pooling = "cls"
    projection: bool = True
    normalize: bool = False  # L2, before the dot product


class Constant(Section):
    schedule: Literal["constant"]
    value: Fraction


class ConstantWithRefresh(Section):
    schedule: Literal["constant_with_refresh"]
    value: Fraction
    every: Positive  # updates; each time the key encoder becomes a copy


class Linear(Section):
    """From the first value to the second between two numbers of updates, constant outside."""

    schedule: Literal["linear"]
    updates: tuple[int, int]
    values: tuple[Fraction, Fraction]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not 0 <= self.updates[0] < self.updates[1]:
            raise ValueError("updates: give [first, last] with 0 <= first < last")
        return self


class Exponential(Section):
    """1 - n^-power at update n, kept between two bounds."""

    schedule: Literal["exponential"]
    power: float = Field(gt=0)
    within: tuple[Fraction, Fraction]


Momentum = Annotated[
    Annotated[Constant | ConstantWithRefresh | Linear | Exponential, Field(discriminator="schedule")],
    BeforeValidator(lambda x: {"schedule": "constant", "value": x} if isinstance(x, int | float) else x),
]


class Queue(Section):
    size: Positive = 131072  # keys; another size on resume keeps the newest and fills again
    sharded: bool = False  # each rank holds its share of the keys, for one exchange of the queries a step


class Contrast(Section):
    """XlCo, as docs/contrast.md explains it. `keys: momentum` is InfoXLM's key encoder; `keys: gradient` trains both
    sides on the negatives of the whole step."""

    keys: Literal["momentum", "gradient"] = "momentum"
    negatives: Literal["queue", "in_batch", "both"] = "queue"
    symmetric: bool = False
    temperature: float = Field(gt=0)  # no default: the paper's text has none, its code has 0.25
    learn_temperature_within: tuple[float, float] | None = None  # bounds; the temperature above is then the start
    margin: float = Field(default=0.0, ge=0)  # taken off the positive's score (LaBSE)
    same_text: Literal["mask", "positive", "ignore"] = "mask"  # what keys are that share a text with the pair
    drop_within: float | None = None  # negatives that score above the positive less this are left out; null: none
    pairs_per_row: Positive = 1  # of an n-way row, with same_text: positive
    queue: Queue = Queue()
    momentum: Momentum = Constant(schedule="constant", value=0.9999)  # a number, or one of the reference's schedules
    mixup: Literal["off", "paper", "reference"] = "off"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.keys == "gradient" and self.negatives == "queue":
            raise ValueError("keys: gradient needs negatives of the step: set negatives to in_batch or both")
        if self.learn_temperature_within is not None:
            lowest, highest = self.learn_temperature_within
            if not 0 < lowest <= self.temperature <= highest:
                raise ValueError(
                    "learn_temperature_within: give [lowest, highest] above 0 with the temperature between"
                )
        if self.same_text == "positive" and self.mixup != "off":
            raise ValueError("same_text: positive needs mixup: off, for mixed pairs share a part of their texts only")
        if self.pairs_per_row > 1 and self.same_text != "positive":
            raise ValueError("pairs_per_row above 1 needs same_text: positive, or its pairs mask each other")
        return self

    @property
    def uses_queue(self) -> bool:
        return self.negatives != "in_batch"

    @property
    def in_batch(self) -> bool:
        return self.negatives != "queue"


class Batch(Section):
    """One optimizer step: `lanes` micro-batches, whatever the number of ranks (which divides the lanes)."""

    lanes: Positive
    mmlm_tokens: int = Field(ge=0)  # a lane, special tokens counted
    tlm_tokens: int = Field(ge=0)
    xlco_pairs: int = Field(ge=0)


class Masking(Section):
    """Of the pieces, never the special tokens: `probability` are chosen; of those `mask` become <mask>, `random` any
    piece."""

    probability: Fraction = 0.15
    mask: Fraction = 0.8
    random: Fraction = 0.1


class Sampling(Section):
    """Sources are drawn with p^alpha of their items; items are shuffled over a window of packs of 512 rows."""

    alpha: Fraction = 0.7
    window_packs: Positive = 16
    pivot: str | None = None  # of an n-way row, this language is one side ...
    pivot_share: Fraction = 0.0  # ... in at least this share of draws

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.pivot is None) != (self.pivot_share == 0):
            raise ValueError("pivot and pivot_share go together: set both, or neither")
        return self


class Weights(Section):
    mmlm: float = Field(default=1.0, ge=0)
    tlm: float = Field(default=1.0, ge=0)
    xlco: float = Field(default=1.0, ge=0)


class Optimizer(Section):
    """AdamW with linear warm-up and decay; biases and LayerNorms are not decayed."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, ge=0)  # global gradient norm; 0 leaves it alone
    steps: Positive
    warmup: int = Field(ge=0)
    most_skipped: Positive = 20  # steps in a row that were not finite and so not applied; then the run ends


class Memory(Section):
    activation_checkpointing: bool = False  # keep each layer's input only, and compute the layer again in backward
    dry_run: bool | None = None  # one step with the longest batch, not applied, before the first; null: on GPUs


class Timeout(Section):
    """Seconds that a rank waits for the others before it ends: `join` until all are there, `start` from then up to the
    first step, `step` after it, with the longest save in it."""

    join: Positive = 600
    start: Positive = 3600
    step: Positive = 900


class Log(Section):
    every: Positive = 10  # steps a line
    geometry: Positive = 100  # steps a pass over the representations: alignment, uniformity, effective rank
    tensorboard: bool = True


class Checkpoint(Section):
    every: Positive = 1000  # steps
    keep: Positive = 2  # the newest
    keep_every: Positive | None = None  # and for good those of steps that are a multiple of this
    asynchronous: bool = False  # copy to the host's memory, write in a thread, commit behind a later step


class Resume(Section):
    """What becomes of a run folder that holds checkpoints: docs/checkpoints.md."""

    mode: Literal["auto", "required", "never"] = "auto"  # start or go on; only go on; only start
    allow_change: tuple[str, ...] = ()  # keys of the recipe, or sections, that may differ from the run's so far
    fallback: bool = False  # where the newest checkpoint is damaged, go on from the newest that is not

    @model_validator(mode="before")
    @classmethod
    def _is_a_section(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"write resume: {{mode: {value}}}, or resume.mode={value} on the command line")
        return value


class Probe(Section):
    """A held-out retrieval probe at the universal layer, every n steps."""

    data: Path
    every: Positive = 500
    pivot: str = "en"
    languages: tuple[str, ...] = ()  # empty: all
    pairs: Positive = 500  # a language, at most


class Recipe(Section):
    preset: Literal["infoxlm", "strong"] | None = None  # values below the recipe's own, see PRESETS
    run: Path  # everything a run writes lies here
    corpus: Path
    engine: Path  # a DeepSpeed configuration, see ds_configs/README.md
    seed: int = 1
    model: Model = Model()
    contrast: Contrast
    batch: Batch
    masking: Masking = Masking()
    sampling: Sampling = Sampling()
    weights: Weights = Weights()
    reduction: Literal["per_task", "reference"] = "per_task"
    optimizer: Optimizer
    memory: Memory = Memory()
    timeout: Timeout = Timeout()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    resume: Resume = Resume()
    probe: Probe | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.model.init is None and self.model.universal_layer > self.model.layers:
            raise ValueError(
                f"model.universal_layer {self.model.universal_layer} is above model.layers {self.model.layers}"
            )
        if self.model.init is None and self.model.width % self.model.heads:
            raise ValueError(f"model.width {self.model.width} is not a multiple of model.heads {self.model.heads}")
        if self.optimizer.warmup >= self.optimizer.steps:
            raise ValueError("optimizer.warmup must be below optimizer.steps")
        pairs = self.batch.lanes * self.batch.xlco_pairs * self.optimizer.steps
        if self.tasks["xlco"] and self.contrast.uses_queue and pairs <= self.contrast.queue.size:
            raise ValueError(
                f"contrast.queue.size {self.contrast.queue.size} would never fill: all steps have {pairs} pairs"
            )
        if not any(self.tasks.values()):
            raise ValueError("no task is left: give one of mmlm, tlm, xlco both a weight and a batch size above 0")
        return self

    @property
    def tasks(self) -> dict[str, bool]:
        """Which of the three losses take part: those with a weight and a batch size."""
        sizes = {"mmlm": self.batch.mmlm_tokens, "tlm": self.batch.tlm_tokens, "xlco": self.batch.xlco_pairs}
        return {task: bool(size and getattr(self.weights, task)) for task, size in sizes.items()}


# `infoxlm` is the paper's contrast; `strong` what later encoders train with (docs/contrast.md).
PRESETS: dict[str, dict[str, Any]] = {
    "infoxlm": {
        "model": {"normalize": False},
        "contrast": {"keys": "momentum", "negatives": "queue", "symmetric": False, "mixup": "paper"},
    },
    "strong": {
        "model": {"normalize": True},
        "contrast": {"keys": "gradient", "negatives": "in_batch", "symmetric": True, "mixup": "off"},
    },
}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a YAML file on top of its preset, with `key.path=value` overrides above both. UserError names every
    wrong key or value."""
    tree = read_yaml(path, "recipe")
    for override in overrides or []:
        _set(tree, override)
    for section, values in PRESETS.get(str(tree.get("preset")), {}).items():
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section] = values | tree[section]
    return check(Recipe, tree, str(path))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; UserError, which calls the file a `what`, where there is none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such {what}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a {what} is a mapping of keys to values")
    return tree


def check(kind: type[T], tree: dict[str, Any], where: str) -> T:
    """`tree` as a `kind`; all that is wrong with it in one line."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key: remove it or correct its spelling"
    if error["type"] == "missing":
        return f"{key} is missing: set it"
    if error["type"] == "model_type":
        return f"{key} is a section: give its keys, not {error['input']!r}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key}: {message} (got {error['input']!r})" if key else message


def _set(tree: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise UserError(f"{override!r}: an override has the form key.path=value")
    *parents, last = path.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"{override!r}: {parent} is a value, not a section")
        tree = below
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not valid YAML") from None
