"""The documentation agrees with the program: links and anchors, the site's pages, commands, keys of recipes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from infoxlm_ds.cli import app
from infoxlm_ds.config import Recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ds_configs" / "README.md", *PAGES]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Command(NamedTuple):
    """A command line. A `whole` one stands in a block; others, in a sentence, may lack what must be given."""

    line: str
    whole: bool


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _prose(path: Path) -> str:
    """The text without blocks of code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def _anchors(path: Path) -> set[str]:
    """Anchors of headings that both the site and code hosts make."""
    titles = re.findall(r"^#+ (.+)$", _prose(path), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain} & {re.sub(r"\s", "-", title) for title in plain}


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_links_lead_to_files_and_anchors_that_are_there(path: Path) -> None:
    for link in LINK.findall(CODE.sub("", _prose(path))):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = path.parent / place if place else path
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in _anchors(target), f"{link}: no such heading"
        assert path not in PAGES or target.resolve().is_relative_to(DOCS), f"{link}: leads out of the site"


def test_every_page_is_in_the_navigation_once() -> None:
    class Loader(yaml.SafeLoader):
        """Reads the names of Python's functions as null."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    assert sorted(_leaves(nav)) == [path.name for path in PAGES]


def _leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []:
        yield from _leaves(branch)


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_documented_commands_exist_with_their_options(path: Path) -> None:
    """By the program's own parser, without running them."""
    for command in commands_of(path):
        try:
            _parse(shlex.split(command.line))
        except Exception as error:  # typer does not publish the types of its errors
            said = error.format_message() if hasattr(error, "format_message") else str(error)
            if command.whole or not re.search("Missing|requires an argument", said):
                pytest.fail(f"{command.line}: {said}")


def commands_of(path: Path) -> Iterator[Command]:
    text = path.read_text(encoding="utf-8")
    prose = _prose(path)
    for block in [*(body for _, _, body in FENCE.findall(text)), *INDENTED.findall(prose)]:
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if line.strip().startswith("infoxlm "):
                yield Command(_example(line.strip()), whole=True)
    for code in CODE.findall(prose):
        if code.startswith("infoxlm "):
            yield Command(_example(code), whole=False)


def _example(line: str) -> str:
    """A line of the shell, or of a manual, as arguments: one of several choices, optional parts too, numbers for N."""
    line = re.sub(r"(?:^|\s)#.*| [<>|] .*|\s*&&.*", "", line.replace("--model/--no-model", "--no-model"))
    line = re.sub(r" \| --[^\]]*(?=\])", "", line)
    line = re.sub(r"\.\.\.|[\[\]](?![^'\s]*')", "", line)
    return re.sub(r"(?<= )(N|K|T|G|GiB)\b(?!/)", "8", line)


def _parse(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    name, *words = [word for word in words if word not in ("--help", "--version", "--install-completion")]
    while hasattr(command, "get_command") and words:
        name, *words = words
        command = command.get_command(None, name)
        assert command is not None, f"{name} is no command"
    if not hasattr(command, "get_command"):
        command.make_context(name, words)


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_documented_keys_of_recipes_exist(path: Path) -> None:
    table = (DOCS / "recipe.md").read_text(encoding="utf-8")
    keys = {key.replace("[]", "") for key in re.findall(r"^\| `([\w.\[\]]+)`", table, re.MULTILINE)}
    known = keys | set(Recipe.model_fields)
    sections = {key.split(".")[0] for key in keys if "." in key}
    written = [code.partition("=")[0].partition(":")[0] for code in CODE.findall(_prose(path))]
    written += [word.partition("=")[0] for c in commands_of(path) for word in shlex.split(c.line) if "=" in word]
    for key in written:
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key) and key.split(".")[0] in sections and not key.endswith(".py"):
            assert key in known, f"{key}: no such key"
