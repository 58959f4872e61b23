"""Files that come with the package: recipes, engine configurations and held-out texts. Each has a name, which a recipe
or a command can give in place of a path.

In a clone, `infoxlm_ds/recipes` and `infoxlm_ds/ds_configs` are links to the folders at its root. A wheel holds copies.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
EMBEDDED = HERE.parent / "data_prep" / "embedded"


def _named(folder: Path, suffix: str) -> dict[str, Path]:
    return {path.name.removesuffix(suffix): path for path in sorted(folder.glob(f"*{suffix}"))}


RECIPES = _named(HERE / "recipes", ".yaml")
ENGINES = _named(HERE / "ds_configs", ".json")
TEXTS = _named(EMBEDDED, ".jsonl.xz")
