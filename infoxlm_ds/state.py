"""The state of a run. The trainer changes it, and the reports read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from infoxlm_ds import dist
from infoxlm_ds.checkpoint.checkpoints import Best, Checkpoints, Saved
from infoxlm_ds.checkpoint.identity import Identity
from infoxlm_ds.config import Recipe
from infoxlm_ds.data.batch import JointBatch
from infoxlm_ds.data.loader import Loader
from infoxlm_ds.engine.engine import Engine
from infoxlm_ds.losses.queue import KeyQueue
from infoxlm_ds.model.momentum import MomentumEncoder
from infoxlm_ds.monitor.meters import Meter, Scalars
from infoxlm_ds.monitor.probe import RetrievalProbe
from infoxlm_ds.objective import Objective
from infoxlm_ds.planner.cost import useful
from infoxlm_ds.planner.workload import Setting, Shape, read_text


@dataclass
class TrainState:
    """`step`: optimizer steps applied. `consumed`: steps whose batches were taken from the streams."""

    identity: Identity
    vocabulary: int
    loader: Loader
    objective: Objective
    engine: Engine
    momentum: MomentumEncoder | None
    queue: KeyQueue | None
    checkpoints: Checkpoints
    probe: RetrievalProbe | None
    pairs: dict[str, tuple[str, str]]  # the two languages of each pair, by the pair's name
    shares: dict[str, dict[str, float]] = field(default_factory=dict)  # of each task's texts, by language; on rank 0
    step: int = 0
    consumed: int = 0
    best: Best | None = None  # of the probes
    unsaved: str = ""  # why the last save failed, if it did
    meter: Meter = field(default_factory=Meter)
    observed: Scalars = field(default_factory=dict)  # values of single steps, until they are logged
    skipped: list[str] = field(default_factory=list)  # for each step since the last applied one: why it was not
    again: list[JointBatch] | None = None  # lanes of a step that failed only because of the loss scale

    @cached_property
    def operations(self) -> float:
        """Useful floating-point operations of a step, with sentences of mean length (planner/cost.py)."""
        text = read_text(self.recipe)
        shape = Shape.of(self.recipe, text.vocabulary)
        return useful(Setting(self.recipe, self.identity.engine, shape, text, dist.world_size()))

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.identity.recipe

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps happens now. At the last step, it always does."""
        return self.step % every == 0 or self.step == self.recipe.optimizer.steps

    def saved(self) -> Saved:
        """What a checkpoint holds beside its tensors, at this moment."""
        return Saved(self.step, self.consumed, self.loader.cursors, self.loader.left_out, self.best)
