"""Reads recipes and other descriptions in YAML. All mistakes in them are told in one line.

The values of a recipe come from the defaults, the preset, the recipe file and `key.path=value` overrides; later ones
win.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from infoxlm_ds import shipped
from infoxlm_ds.config import PRESETS, Recipe, UserError

LONGEST_QUOTE = 200  # characters of the user's input in a message
T = TypeVar("T", bound=BaseModel)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a YAML file, or the one of that name that comes with the package. `key.path=value` overrides
    win over the file, the file wins over its preset. A path to an engine configuration in the file is relative to its
    folder. UserError names every wrong key or value."""
    path = shipped.RECIPES.get(str(path), path)
    tree = read_yaml(path, "recipe")
    if isinstance(engine := tree.get("engine"), str) and engine not in shipped.ENGINES:
        tree["engine"] = str(path.parent / engine)
    for override in overrides or []:
        _set(tree, override)
    for section, values in PRESETS.get(str(tree.get("preset")), {}).items():
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section] = values | tree[section]
    return check(Recipe, tree, str(path))


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    """The mapping in a YAML file. UserError if there is none; `name` is the kind of file in the message."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such {name}") from None
    except OSError as error:
        raise UserError(f"{path}: the {name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a {name} must be a mapping of keys to values")
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML would silently take the last, and aliases within what an alias
    stands for, with which a few lines can stand for more than any memory holds."""

    _anchored = 0  # anchors around the node that is read

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        anchored = 0
        if not self.check_event(yaml.AliasEvent):
            anchored = int(getattr(self.peek_event(), "anchor", None) is not None)  # type: ignore[no-untyped-call]
        elif self._anchored:
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, "write the value: an alias must not stand for other aliases", mark)
        self._anchored += anchored
        node = super().compose_node(parent, index)
        self._anchored -= anchored
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. ValueError with a message of one line if it has none."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that does not exist is a plain ValueError
        raise ValueError(_short(" ".join(str(error).replace('in "<unicode string>", ', "at ").split()))) from None


def check(kind: type[T], tree: dict[str, Any], where: str) -> T:
    """Make a `kind` from `tree`. UserError lists all errors in one line."""
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
        return f"{key} is a section: give its keys, not {_short(repr(error['input']))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not key or isinstance(error["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (got {_short(repr(error['input']))})"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _set(tree: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise UserError(f"{_short(repr(override))}: an override has the form key.path=value")
    *parents, last = path.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"{_short(repr(override))}: {parent} is a value, not a section")
        tree = below
    try:
        tree[last] = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{_short(repr(override))}: the value is not valid YAML: {error}") from None
