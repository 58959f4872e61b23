"""All that a run is made of, for the trainer to move and for reports to read."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class TrainState:
    """`step` counts applied optimizer steps, `consumed` the steps' batches taken from the streams."""

    identity: Identity
    vocabulary: int
    loader: Loader
    objective: Objective
    engine: Engine
    momentum: MomentumEncoder | None
    queue: KeyQueue | None
    checkpoints: Checkpoints
    probe: RetrievalProbe | None
    step: int = 0
    consumed: int = 0
    best: Best | None = None  # of the probes
    unsaved: str = ""  # why the last save failed, if it did
    meter: Meter = field(default_factory=Meter)
    observed: Scalars = field(default_factory=dict)  # of single steps, until they are logged
    skipped: list[str] = field(default_factory=list)  # why each step since the last applied one was not applied
    again: list[JointBatch] | None = None  # a step's lanes that only the loss scale kept from being applied

    @property
    def recipe(self) -> Recipe:
        return self.identity.recipe

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps happens now: at the last step, it always does."""
        return self.step % every == 0 or self.step == self.recipe.optimizer.steps

    def saved(self) -> Saved:
        """What a checkpoint says of this moment, beside its tensors."""
        return Saved(self.step, self.consumed, self.loader.cursors, self.best)
