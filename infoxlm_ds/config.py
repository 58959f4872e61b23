"""The typed tree that a recipe is checked against; `reading.py` reads one.

An unknown key is an error. The tree is frozen: a run cannot change its recipe.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from infoxlm_ds import shipped

# Bounds that no run reaches: a mistyped number would end in a lack of memory, or in an answer that never comes.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Size = Annotated[int, Field(gt=0, le=2**17)]  # of a matrix or a stack of them, of the lanes of a step
Items = Annotated[int, Field(ge=0, le=2**22)]  # in a lane
Seconds = Annotated[int, Field(gt=0, le=10**7)]  # four months
Fraction = Annotated[float, Field(ge=0, le=1)]
Pooling = Literal["cls", "mean"]
SERVERS = ("http", "https", "s3", "gs", "az")
Place = Path | str  # a folder, or the URL of one on a server


class UserError(Exception):
    """A mistake of the user: one line that says what is wrong, where, and what to do. The commands exit with code 2."""

    def __init__(self, message: str) -> None:
        """Line breaks and control characters, which may stand in what the user wrote, are escaped."""
        super().__init__("".join(x if x.isprintable() else ascii(x)[1:-1] for x in message))


def place(value: Any) -> Place:
    """The folder or the URL that a text names. ValueError if it names none, or a URL of a form that is not read."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("give a folder or a URL")
    scheme, sign, rest = value.partition("://")
    if not sign:
        return Path(value)
    if scheme not in SERVERS or not rest.strip("/") or set("?#@") & set(rest):
        forms = ", ".join(f"{name}://" for name in SERVERS)
        raise ValueError(f"a URL begins with one of {forms} and has no password, no ? and no #")
    return value.rstrip("/")


class Section(BaseModel):
    """Base of all models: unknown keys are errors, numbers are finite, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The encoder's shape, and how it makes sentence representations."""

    init: str | None = None  # a Hugging Face folder or a name on its hub: its shape replaces the next six keys
    type: Literal["xlm-roberta", "xlm-roberta-xl", "bert", "modernbert"] = "xlm-roberta"  # the family of its layers
    layers: Annotated[int, Field(gt=0, le=1000)] = 12  # in all; more learn more and take more time and memory
    width: Size = 768  # of a token's state; a multiple of heads
    heads: Size = 12  # of attention, in each layer
    feed_forward: Size = 3072  # width of the inner part of a layer, usually 4 x width
    positions: Size = 512  # tokens of the longest sequence, special tokens included
    # the contrast reads the output of this layer (InfoXLM, section 4.1); from 1 to the number of layers. The paper has
    # 8 of 12 and 12 of 24; a small model with little text does best with a low one
    universal_layer: Size = 8
    pooling: Pooling = "cls"  # a sentence's vector is its first token's state, or the mean over its tokens
    projection: bool = True  # a trained matrix between the pooled state and the contrast
    normalize: bool = False  # L2, before the dot product: scores are cosines


class Constant(Section):
    """The same at every update."""

    schedule: Literal["constant"]  # which schedule it is
    value: Fraction  # of the momentum, at every update


class ConstantWithRefresh(Section):
    """The same at every update, and a fresh copy of the encoder from time to time."""

    schedule: Literal["constant_with_refresh"]  # which schedule it is
    value: Fraction  # of the momentum, between two copies
    every: Positive  # updates; at each such update the key encoder becomes a copy of the encoder


class Linear(Section):
    """Linear from the first value to the second between two numbers of updates; constant before and after."""

    schedule: Literal["linear"]  # which schedule it is
    updates: tuple[int, int]  # [first, last]: at these the two values hold
    values: tuple[Fraction, Fraction]  # of the momentum, at the first and at the last of these updates

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not 0 <= self.updates[0] < self.updates[1]:
            raise ValueError("updates: give [first, last] with 0 <= first < last")
        return self


class Exponential(Section):
    """1 - n^-power at update n, kept between two bounds."""

    schedule: Literal["exponential"]  # which schedule it is
    power: float = Field(gt=0)  # in the formula 1 - n^-power, for update n
    within: tuple[Fraction, Fraction]  # [lowest, highest] momentum


Momentum = Annotated[
    Annotated[Constant | ConstantWithRefresh | Linear | Exponential, Field(discriminator="schedule")],
    BeforeValidator(lambda x: {"schedule": "constant", "value": x} if isinstance(x, int | float) else x),
]


class Queue(Section):
    """Keys of earlier steps, as further negatives. It is not read before it is full."""

    size: Positive = 131072  # keys; with another size, a run keeps the newest keys and fills the queue again
    sharded: bool = False  # each rank holds a part of the keys; this costs one exchange of the queries in each step


class Contrast(Section):
    """XlCo, see docs/contrast.md. `keys: momentum`: InfoXLM's key encoder. `keys: gradient`: trained keys; both sides
    get a gradient from the negatives of the whole step."""

    keys: Literal["momentum", "gradient"] = "momentum"  # a slow copy of the encoder makes the keys, or they are trained
    # queue: keys of earlier steps. in_batch: the other pairs of the step, on all ranks; keys: gradient needs it or both
    negatives: Literal["queue", "in_batch", "both"] = "queue"
    symmetric: bool = False  # the loss in both directions; otherwise in one, drawn at random for each pair
    # scores are divided by it; lower: harder negatives count more. No default: the paper gives none, its code has 0.25
    temperature: float = Field(ge=1e-4)
    # [lowest, highest]: the temperature is trained too, from `temperature` on; null: it stays
    learn_temperature_within: tuple[float, float] | None = None
    margin: float = Field(default=0.0, ge=0)  # subtracted from the positive's score (LaBSE)
    same_text: Literal["mask", "positive", "ignore"] = "mask"  # what to do with keys that share a text with the pair
    drop_within: float | None = None  # leave out negatives with a score above the positive's minus this; null: keep all
    pairs_per_row: Positive = 1  # of an n-way row (one sentence in more than two languages); see docs/contrast.md
    hard_negatives: int = Field(default=0, ge=0, le=255)  # of an item, at most: wrong sentences that its row comes with
    queue: Queue = Queue()  # read only if negatives are queue or both
    momentum: Momentum = Constant(schedule="constant", value=0.9999)  # of the key encoder's average
    # paper: an item is made of two pairs. reference: as the paper's code does it, see docs/contrast.md
    mixup: Literal["off", "paper", "reference"] = "off"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.keys == "gradient" and self.negatives == "queue":
            raise ValueError("keys: gradient needs negatives of the step: set negatives to in_batch or both")
        if self.learn_temperature_within is not None:
            lowest, highest = self.learn_temperature_within
            if not 1e-4 <= lowest <= self.temperature <= highest:
                raise ValueError(
                    "learn_temperature_within: give [lowest, highest] from 0.0001 on, the temperature between them"
                )
        if self.same_text == "positive" and self.mixup != "off":
            raise ValueError(
                "same_text: positive needs mixup: off, because mixed pairs share only a part of their texts"
            )
        if self.hard_negatives and self.mixup != "off":
            raise ValueError("hard_negatives needs mixup: off, because they are single sentences")
        if self.pairs_per_row > 1 and self.same_text != "positive":
            raise ValueError(
                "pairs_per_row above 1 needs same_text: positive, otherwise the pairs of a row mask each other"
            )
        return self

    @property
    def uses_queue(self) -> bool:
        """Whether keys of earlier steps are negatives."""
        return self.negatives != "in_batch"

    @property
    def in_batch(self) -> bool:
        """Whether other pairs of the step are negatives."""
        return self.negatives != "queue"


class Batch(Section):
    """One optimizer step. A lane is one micro-batch of the step; its contents do not depend on the rank. The number of
    ranks must divide the lanes."""

    lanes: Size  # micro-batches of a step, over all ranks; a run cannot change it later
    mmlm_tokens: Items  # of monolingual text, in each lane, with special tokens; 0: no MMLM
    tlm_tokens: Items  # of pairs for TLM, in each lane, with special tokens; 0: no TLM
    xlco_pairs: Items  # for the contrast, in each lane; 0: no XlCo. More pairs are more negatives

    @property
    def worlds(self) -> list[int]:
        """The numbers of ranks that divide the lanes, in rising order."""
        return [world for world in range(1, self.lanes + 1) if self.lanes % world == 0]

    def lanes_of(self, rank: int, world: int) -> list[int]:
        """The lanes that a rank of `world` runs. UserError if `world` does not divide the lanes."""
        if world not in self.worlds:
            raise UserError(
                f"batch.lanes is {self.lanes}, which {world} ranks do not divide: choose one of "
                f"{', '.join(map(str, self.worlds))}"
            )
        return list(range(rank, self.lanes, world))


class MaskingStage(Section):
    """What this names holds from `from_step` on."""

    from_step: Positive  # the first step with this probability
    probability: float = Field(gt=0, le=1)  # as above, from this step on


class Masking(Section):
    """Fractions of the pieces, special tokens excepted: `probability` are chosen; of these, `mask` become `<mask>` and
    `random` become a random piece."""

    probability: Fraction = 0.15  # share of the pieces that is to be predicted
    mask: Fraction = 0.8  # share of the chosen pieces that becomes `<mask>`
    random: Fraction = 0.1  # share of the chosen pieces that becomes another piece; the rest stays as it is
    stages: tuple[MaskingStage, ...] = ()  # later probabilities

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.mask + self.random > 1:
            raise ValueError("mask and random are parts of the chosen pieces: their sum is above 1")
        _check_rising(self.stages)
        return self

    def probability_at(self, step: int) -> float:
        """The fraction of pieces that is chosen in step 0, 1, ..."""
        begun = [stage.probability for stage in self.stages if stage.from_step <= step]
        return begun[-1] if begun else self.probability

    @property
    def highest(self) -> float:
        """The probability of the stage that masks most."""
        return max([self.probability, *(stage.probability for stage in self.stages)])


Shares = dict[str, Annotated[float, Field(ge=0)]]


class SamplingStage(Section):
    """What this names holds from about `from_step` on."""

    from_step: Positive  # about the first step of this stage
    alpha: Fraction | None = None  # null: as before
    weights: Shares | None = None  # null: as before; {}: go back to alpha


class Sampling(Section):
    """How many items a run reads of each source, see docs/data.md, "Mixing". Items are shuffled within a window of
    packs; a pack is 512 tokenised rows."""

    # items are read in proportion to p^alpha; p is the part of a source, or of a language. Lower: more of small ones
    alpha: Fraction = 0.7
    by: Literal["source", "language"] = "source"  # language: sources of the same languages are one for alpha
    weights: Shares = {}  # relative shares in place of alpha, by name of a source or pattern, such as para.*
    most_epochs: float | None = Field(default=None, gt=0)  # passes over a source in a run; others get what is left
    stages: tuple[SamplingStage, ...] = ()  # later alphas and weights
    window_packs: Positive = 16  # packs of a window; more: better shuffled, and more memory with a corpus on a server
    pivot: str | None = None  # a language that is one side of the pair drawn from an n-way row ...
    pivot_share: Fraction = 0.0  # ... in at least this fraction of draws

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.pivot is None) != (self.pivot_share == 0):
            raise ValueError("pivot and pivot_share go together: set both, or neither")
        if any(stage.alpha is None and stage.weights is None for stage in self.stages):
            raise ValueError("stages: each changes alpha, weights or both")
        _check_rising(self.stages)
        return self

    @property
    def settings(self) -> list[tuple[float, Shares]]:
        """Alpha and weights of each stage. The first is what the section's own keys say."""
        found = [(self.alpha, self.weights)]
        for stage in self.stages:
            before, shares = found[-1]
            alpha = before if stage.alpha is None else stage.alpha
            found.append((alpha, shares if stage.weights is None else stage.weights))
        return found

    @property
    def depends_on_steps(self) -> bool:
        """Whether the order of items depends on how much a step takes, and how many steps there are."""
        return bool(self.stages) or self.most_epochs is not None


def _check_rising(stages: tuple[MaskingStage | SamplingStage, ...]) -> None:
    if any(one.from_step >= other.from_step for one, other in itertools.pairwise(stages)):
        raise ValueError("stages: give them with rising from_step; before the first, the section's own keys hold")


class Weights(Section):
    """Factors of the three losses in their sum."""

    mmlm: float = Field(default=1.0, ge=0)  # 0: no MMLM
    tlm: float = Field(default=1.0, ge=0)  # 0: no TLM
    xlco: float = Field(default=1.0, ge=0)  # 0: no XlCo


class Optimizer(Section):
    """AdamW with linear warm-up and linear decay. Biases and LayerNorms have no weight decay."""

    learning_rate: float = Field(gt=0)  # the highest, at the end of the warm-up; lower it if losses jump or are nan
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)  # of Adam's two averages
    eps: float = Field(default=1e-6, gt=0)  # of Adam, in its denominator
    weight_decay: float = Field(default=0.01, ge=0)  # of AdamW, times the learning rate
    clip: float = Field(default=1.0, ge=0)  # of the global gradient norm; 0: no clipping
    steps: Positive  # of the whole run; the learning rate is 0 at the last
    warmup: int = Field(ge=0)  # steps in which the learning rate rises; below steps
    most_skipped: Positive = 20  # the run ends after so many steps in a row that were not finite


class Memory(Section):
    """Memory against speed, and how kernels run. Nothing here changes what is computed, except by rounding."""

    activation_checkpointing: bool = False  # keep only each layer's input, and compute the layer again in backward
    dry_run: bool | None = None  # first run a step with the longest batch and do not apply it; null: on GPUs only
    compile: bool | None = None  # by torch.compile, what follows attention in a layer; null: on GPUs, below ZeRO 3
    deterministic: bool = False  # on a GPU, only kernels whose results do not vary: a run goes on bit by bit; slower


class Timeout(Section):
    """Seconds that a rank waits for the others before it ends: `join` until all have started, `start` from then until
    the first step is done, `step` afterwards. `step` must be longer than the longest save."""

    join: Seconds = 600  # seconds; raise it if hosts start at very different times
    start: Seconds = 3600  # seconds; raise it for long compilations, downloads or checkpoints
    step: Seconds = 900  # seconds; raise it if a save or a probe takes longer


class Log(Section):
    """What a run writes down, see docs/monitoring.md."""

    every: Positive = 10  # steps between two lines
    geometry: Positive = 100  # steps between two measurements of alignment, uniformity and effective rank
    tensorboard: bool = True  # files for TensorBoard in RUN/tensorboard
    csv: bool = False  # metrics.csv: step, tag, value
    wandb: str | None = None  # a project of Weights & Biases; WANDB_MODE=offline keeps it on this machine


class Checkpoint(Section):
    """When a run saves, and what it keeps, see docs/checkpoints.md."""

    every: Positive = 1000  # steps between two saves; a crash costs at most so many
    keep: Positive = 2  # number of the newest checkpoints that are kept
    keep_every: Positive | None = None  # checkpoints at multiples of this step are kept too
    asynchronous: bool = False  # for long saves: copy to the host's memory, write in a thread, commit later


class Resume(Section):
    """Whether and how a run goes on from the checkpoints in its folder, see docs/checkpoints.md."""

    mode: Literal["auto", "required", "never"] = "auto"  # auto: start or go on; required: only go on; never: only start
    allow_change: tuple[str, ...] = ()  # keys or sections of the recipe that may change
    fallback: bool = False  # if the newest checkpoint is damaged, go on from the newest undamaged one

    @model_validator(mode="before")
    @classmethod
    def _is_a_section(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"write resume: {{mode: {value}}}, or resume.mode={value} on the command line")
        return value


class Probe(Section):
    """Every `every` steps, measure retrieval on held-out text, at the universal layer. `data`: JSON lines, or the name
    of a text that comes with the package, such as home_assistant.dev."""

    # a path, or the name of a text that comes with the package, such as home_assistant.dev; never text of the corpus
    data: Annotated[Path, BeforeValidator(lambda x: shipped.TEXTS.get(x, x) if isinstance(x, str) else x)]
    every: Positive = 500  # steps between two probes
    pivot: str = "en"  # the language that all others are paired with
    languages: tuple[str, ...] = ()  # empty: all
    pairs: Positive = 500  # of each language, at most


class Recipe(Section):
    """A run, whole."""

    preset: Literal["infoxlm", "strong"] | None = None  # the recipe's own values win over the preset's, see PRESETS
    run: Path  # the folder for everything that the run writes
    corpus: Annotated[Place, PlainValidator(place)]  # a prepared corpus: a folder, or a URL (docs/data.md)
    engine: Path  # a DeepSpeed configuration: a name or a path, see ds_configs/README.md
    on_damage: Literal["stop", "skip"] = "stop"  # skip: go on without damaged packs, at most 1 % (docs/data.md)
    seed: int = Field(default=1, ge=0, lt=2**63)  # of random weights, the order of data, masks and mixup
    model: Model = Model()
    contrast: Contrast
    batch: Batch
    masking: Masking = Masking()
    sampling: Sampling = Sampling()
    weights: Weights = Weights()
    # per_task: each loss is the mean over its own items. reference: one pooled count divides all three sums
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
        for path in self.resume.allow_change:
            if not _names(self.model_dump(mode="json") | {"tokenizer": None}, path):
                raise ValueError(f"resume.allow_change: {path} is no key or section of a recipe: correct its spelling")
        if self.optimizer.warmup >= self.optimizer.steps:
            raise ValueError("optimizer.warmup must be below optimizer.steps")
        for section, stages in (("masking", self.masking.stages), ("sampling", self.sampling.stages)):
            if stages and stages[-1].from_step >= self.optimizer.steps:
                raise ValueError(f"{section}.stages: from_step {stages[-1].from_step} must be below optimizer.steps")
        pairs = self.batch.lanes * self.batch.xlco_pairs * self.optimizer.steps
        if self.tasks["xlco"] and self.contrast.uses_queue and pairs <= self.contrast.queue.size:
            raise ValueError(
                f"contrast.queue.size {self.contrast.queue.size} would never fill: all steps have only {pairs} pairs"
            )
        if not self.masking.probability and (self.tasks["mmlm"] or self.tasks["tlm"]):
            raise ValueError("masking.probability is 0, so MMLM and TLM learn nothing: set their weights to 0 instead")
        if not self.used_tasks:
            raise ValueError("no task is left: set both a weight and a batch size above 0 for mmlm, tlm or xlco")
        return self

    @property
    def tasks(self) -> dict[str, bool]:
        """Which of the three losses are used: those with a weight and a batch size above 0."""
        sizes = {"mmlm": self.batch.mmlm_tokens, "tlm": self.batch.tlm_tokens, "xlco": self.batch.xlco_pairs}
        return {task: bool(size and getattr(self.weights, task)) for task, size in sizes.items()}

    @property
    def used_tasks(self) -> list[str]:
        """The losses that are used, in the order of `tasks`."""
        return [task for task, used in self.tasks.items() if used]


def _names(tree: dict[str, Any], path: str) -> bool:
    """Whether a path names a key of the tree, or one below a key without a value."""
    key, _, below = path.partition(".")
    if key not in tree:
        return False
    value = tree[key]
    return not below or value is None or (isinstance(value, dict) and _names(value, below))


# `infoxlm`: the paper's contrast; `strong`: the contrast of later encoders (docs/contrast.md).
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
