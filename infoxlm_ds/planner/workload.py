"""A recipe on a number of ranks, described without running it: its text, its model and its engine configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.data.manifest import NoCorpus, Tokenizer, load_manifest
from infoxlm_ds.engine.config import offloaded, precision_of, summed_in, zero_settings
from infoxlm_ds.model.pretrained import VOCABULARY_MULTIPLE, NoModel, init_config, outline

XLM_R = Tokenizer(name="XLM-R", vocab_size=250_002, special_ids={}, files=())
ASSUMED_SENTENCE = 62  # pieces of a sentence, if there is no corpus


@dataclass(frozen=True)
class Text:
    """Lengths of the sequences in tokens, with special tokens. `block`: longest MMLM sequence; `longest`, `mean`:
    longest and mean sequence of the contrast; `pair`: mean TLM sequence. `notes`: where the numbers come from."""

    vocabulary: int
    block: int
    longest: int
    mean: float
    pair: float
    notes: tuple[str, ...]


def read_text(recipe: Recipe, vocabulary: int | None = None) -> Text:
    """Read the lengths from the corpus if it is prepared, otherwise assume them. `vocabulary` replaces the corpus'."""
    try:
        manifest = load_manifest(recipe.corpus)
        tokenizer, longest = manifest.tokenizer, manifest.max_tokens
        parallel = [s for s in manifest.sources if s.kind != "mono"]
        piece = sum(s.tokens for s in parallel) / max(1, sum(s.items * len(s.languages) for s in parallel))
        block, origin = longest + tokenizer.overhead(1), f"of {recipe.corpus}"
        note = f"sentences: {piece:.0f} tokens on average, {longest} at most, as {recipe.corpus} says"
    except NoCorpus:
        tokenizer, piece, longest = XLM_R, float(ASSUMED_SENTENCE), ASSUMED_SENTENCE
        block, origin = recipe.model.positions, "XLM-R's, because there is no corpus yet"
        note = (
            f"sentences: {longest} tokens assumed, MMLM blocks {block}, because there is no corpus at {recipe.corpus}"
        )
    size = tokenizer.vocab_size
    if vocabulary is not None:
        size, origin = vocabulary, "as given"
    texts: Literal[1, 2] = 1 if recipe.contrast.mixup == "off" else 2
    padded = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return Text(
        padded,
        block,
        texts * longest + tokenizer.overhead(texts),
        texts * piece + tokenizer.overhead(texts),
        2 * piece + tokenizer.overhead(2),
        (f"vocabulary: {size:,}, {origin}; {padded:,} rows in the model", note),
    )


@dataclass(frozen=True)
class Shape:
    """A recipe's model in numbers, counted on the model itself. `matrices` and `vectors` list the parameters in the
    optimizer's order: each one's number of elements, and whether the momentum encoder has a copy."""

    layers: int
    universal_layer: int
    width: int
    feed_forward: int
    heads: int
    vocabulary: int
    own: bool  # the shape comes from the recipe, not from `model.init`
    matrices: tuple[tuple[int, bool], ...]
    vectors: tuple[tuple[int, bool], ...]

    @staticmethod
    def of(recipe: Recipe, vocabulary: int) -> Shape:
        """The shape of `model.init`; without it, the recipe's own."""
        published = _published(recipe.model.init)
        model = outline(recipe.model, vocabulary, published)
        config = model.lm.config
        if recipe.model.universal_layer > config.num_hidden_layers:
            raise UserError(f"model.universal_layer {recipe.model.universal_layer} is above {config.num_hidden_layers}")
        copied = {id(p) for p in model.sentence_encoder().parameters()}
        sizes = [(p.ndim > 1, (p.numel(), id(p) in copied)) for p in model.parameters()]
        return Shape(
            config.num_hidden_layers,
            recipe.model.universal_layer,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            vocabulary,
            published is None,
            tuple(size for matrix, size in sizes if matrix),
            tuple(size for matrix, size in sizes if not matrix),
        )

    @cached_property
    def whole(self) -> int:
        """Elements of all parameters."""
        return sum(n for n, _ in self.matrices + self.vectors)

    @cached_property
    def momentum(self) -> int:
        """Elements that the momentum encoder has a copy of."""
        return sum(n for n, copied in self.matrices + self.vectors if copied)

    @property
    def words(self) -> int:
        """Elements of the matrix that is both the word embedding and the LM head."""
        return self.vocabulary * self.width

    def attention_bytes(self, element: int) -> int:
        """Bytes that autograd saves for one token in one layer up to the end of attention: its input, query, key, value
        and result, and the log-sums of the heads in fp32. `element`: bytes of one element."""
        return element * 5 * self.width + 4 * self.heads

    def block_bytes(self, element: int) -> int:
        """Bytes that autograd saves for one row in the rest of a layer: four vectors of the width, two of the
        feed-forward (GELU's input and output), and LayerNorm's statistics in fp32."""
        return element * (4 * self.width + 2 * self.feed_forward) + 16

    def layer_bytes(self, element: int) -> int:
        """Bytes that autograd saves for one token in a whole layer."""
        return self.attention_bytes(element) + self.block_bytes(element)


@dataclass(frozen=True)
class Passes:
    """How often a lane's part goes through a layer: `attended` tokens, and `finished` rows in the rest of the layer. In
    the last layer of a part, only rows that are read are finished."""

    attended: float
    finished: float


def _published(init: str | None) -> PreTrainedConfig | None:
    """The configuration of `model.init`; None if it is a name that cannot be read from the hub now."""
    try:
        return init_config(init) if init else None
    except NoModel:
        if init and Path(init).is_dir():
            raise
        return None


@dataclass(frozen=True)
class Setting:
    """A recipe on `world` ranks with an engine configuration as `load_engine_config` returns it."""

    recipe: Recipe
    engine: dict[str, Any]
    shape: Shape
    text: Text
    world: int

    def at(self, world: int | None = None, stage: int | None = None) -> Setting:
        """The same on another number of ranks or at another ZeRO stage."""
        zero = self.engine.get("zero_optimization", {})
        section = zero if stage is None else zero | {"stage": stage}
        return replace(self, world=world or self.world, engine=self.engine | {"zero_optimization": section})

    @cached_property
    def zero(self) -> Any:
        """The ZeRO section with DeepSpeed's own defaults."""
        return zero_settings(self.engine)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero.stage)

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return precision_of(self.engine)

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return 4 if self.precision == "fp32" else 2

    @property
    def gradient_element(self) -> int:
        """Bytes of a gradient's element on the wire."""
        return 4 if summed_in(self.engine) == "fp32" else 2

    @property
    def accumulation(self) -> int:
        """Lanes of a rank."""
        return self.recipe.batch.lanes // self.world

    @property
    def has_momentum(self) -> bool:
        """Whether there is a momentum encoder."""
        return self.recipe.tasks["xlco"] and self.recipe.contrast.keys == "momentum"

    @property
    def query_sides(self) -> int:
        """How many texts of an item the trained encoder reads, with as many hard negatives as it may have."""
        contrast = self.recipe.contrast
        if not self.recipe.tasks["xlco"]:
            return 0
        return 2 + contrast.hard_negatives if contrast.keys == "gradient" else 1 + contrast.symmetric

    @property
    def key_sides(self) -> int:
        """How many texts of an item the momentum encoder reads."""
        return (1 + self.recipe.contrast.symmetric + self.recipe.contrast.hard_negatives) if self.has_momentum else 0

    @property
    def encodes_twice(self) -> bool:
        """Whether a pass without a graph comes first: with trained keys and several lanes on a rank."""
        return self.query_sides > 0 and self.recipe.contrast.keys == "gradient" and self.accumulation > 1

    @property
    def trunk(self) -> int:
        """Tokens of a lane that run through all layers."""
        return self.tokens("mmlm") + self.tokens("tlm")

    def tokens(self, task: str) -> int:
        """A lane's tokens of MMLM or TLM."""
        tokens: int = getattr(self.recipe.batch, f"{task}_tokens")
        return tokens * self.recipe.tasks[task]

    def masked(self, task: str) -> float:
        """Mean number of a lane's masked tokens, in the stage that masks most."""
        return self.tokens(task) * self.recipe.masking.highest

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a different fragment of the fp32 masters, as in `Engine.sharded`."""
        return self.stage > 0 and self.world > 1

    def of_trunk(self, task: str) -> Passes:
        """A lane's MMLM or TLM: the last layer is finished for masked tokens."""
        tokens, layers = self.tokens(task), self.shape.layers
        return Passes(tokens * layers, tokens * (layers - 1) + self.masked(task))

    def of_a_side(self, length: float) -> Passes:
        """One side of a lane's pairs, of this length: layer K is finished for the first token, or for all."""
        pairs, layers = self.recipe.batch.xlco_pairs * self.recipe.tasks["xlco"], self.shape.universal_layer
        read = 1 if self.recipe.model.pooling == "cls" else length
        return Passes(pairs * length * layers, pairs * (length * (layers - 1) + read))

    def parts(self) -> list[Passes]:
        """All passes of a lane that autograd follows, with sentences of mean length, and those of the key encoder."""
        side = self.of_a_side(self.text.mean)
        return [self.of_trunk("mmlm"), self.of_trunk("tlm"), *[side] * (self.query_sides + self.key_sides)]

    @property
    def checkpointing(self) -> bool:
        """Whether layers are computed again in backward."""
        return self.recipe.memory.activation_checkpointing

    def offloaded(self, part: str) -> bool:
        """Whether `part`, optimizer or param, is in the host's memory."""
        return offloaded(self.engine, part)

    @property
    def bf16_optimizer(self) -> bool:
        """Whether DeepSpeed uses its BF16_Optimizer, which keeps whole fp32 gradients, in place of its ZeRO 1."""
        return self.stage == 1 and self.precision == "bf16" and not self.offloaded("optimizer")
