"""Which run a checkpoint belongs to, and which changes of the recipe the run allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infoxlm_ds.config import Recipe, Sampling, UserError
from infoxlm_ds.data.batch import N_TEXTS
from infoxlm_ds.engine.config import precision_of, stage_of
from infoxlm_ds.reading import check

# Keys that may always change: no step depends on them, or only by rounding. A corpus is compared by content, not by
# path; a preset by its values.
FREE = {"preset", "run", "corpus", "on_damage", "engine", "memory", "timeout", "log", "checkpoint", "resume", "probe"}
# Keys that can never change, because the tensors would have other shapes.
FIXED = (
    "model",
    "batch.lanes",
    "contrast.keys",
    "contrast.learn_temperature_within",
    "tokenizer",
    "tasks.xlco",
    "texts of a key",
)
# If one of these changes, a window of the data holds other items: a stream skips the rest of its current window.
ORDER = ("corpus", "sampling", "seed", "contrast.same_text", "contrast.pairs_per_row", "contrast.mixup")
# These too, if stages or a cap of the sampling depend on what a step takes and on how many there are.
COURSE = ("batch", "optimizer.steps")


@dataclass(frozen=True)
class Difference:
    """A key whose value in the checkpoint, `then`, is not its value `now`."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        then, now = (f"{x!s:.12}" if self.below("corpus", "tokenizer") else x for x in (self.then, self.now))
        return f"{self.key} {then} -> {now}"

    def reorders(self, sampling: Sampling) -> bool:
        """Whether it puts other items into the windows of the data."""
        return self.below(*ORDER, *(COURSE if sampling.depends_on_steps else ()))

    def below(self, *keys: str) -> bool:
        """Whether this is one of the keys, or a key of one of these sections."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)


@dataclass(frozen=True)
class Identity:
    """What identifies a run: its recipe, the content of its engine configuration, and the hashes of its corpus'
    manifest and of its tokenizer's files."""

    recipe: Recipe
    engine: dict[str, Any]
    corpus: str
    tokenizer: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """What state.json holds of the run."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "engine": self.engine,
            "zero_stage": stage_of(self.engine),
            "precision": precision_of(self.engine),
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
        }

    def check(self, state: dict[str, Any], run: Path) -> list[Difference]:
        """The differences between the run that wrote `state` and this one, but for those of the engine. UserError if
        `resume.allow_change` does not allow one of them, or if it can never be allowed."""
        differing = differences(*self._compared(state, run))
        if impossible := [str(d) for d in differing if d.below(*FIXED)]:
            raise UserError(
                f"{run} cannot go on with these changes: {', '.join(impossible)}. Use its own recipe, or take its "
                f"weights into a new run: `infoxlm export {run} MODEL`, then model.init=MODEL and another run folder"
            )
        allowed = self.recipe.resume.allow_change
        if refused := [d for d in differing if not d.below(*allowed)]:
            keys = dict.fromkeys((*allowed, *(".".join(d.key.split(".")[:2]) for d in refused)))
            raise UserError(
                f"{run} holds a run with other settings: {', '.join(map(str, refused))}. Use its own recipe, choose "
                f"another run folder, or allow the changes with 'resume.allow_change=[{', '.join(keys)}]'"
            )
        return differing

    def _compared(self, state: dict[str, Any], run: Path) -> list[dict[str, Any]]:
        """What is compared of the run that wrote `state`, and of this one."""
        saved_recipe = check(Recipe, state["recipe"], f"{run}: the recipe of its checkpoint")
        trees = [
            r.model_dump(mode="json", exclude=FREE) | {"tasks": {"xlco": r.tasks["xlco"]}}
            for r in (saved_recipe, self.recipe)
        ]
        for tree, saved, r in zip(trees, (state, self.as_json()), (saved_recipe, self.recipe), strict=True):
            tree["contrast"].pop("queue")
            if saved_recipe.contrast.uses_queue and self.recipe.contrast.uses_queue:
                tree["texts of a key"] = N_TEXTS[r.contrast.mixup]
            tree |= {key: saved[key] for key in ("corpus", "tokenizer")}
        return trees


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """The values that differ in two trees of keys."""
    flat, other = dict(leaves(then)), dict(leaves(now))
    keys = [key for key in dict.fromkeys((*flat, *other)) if flat.get(key) != other.get(key)]
    return [Difference(key, flat.get(key), other.get(key)) for key in keys]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree of keys, with its path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
