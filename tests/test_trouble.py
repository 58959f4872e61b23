"""The page about trouble: its messages are those of the program, and lead to their entries."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from infoxlm_ds.trouble import Entry, entries, pointer
from tests.integration.commands import infoxlm_here
from tests.trouble import leads_to

ROOT = Path(__file__).parent.parent
ABOUT = [entry for entry in entries() if entry.messages]
USUAL = "There is no XlCo loss at all"  # until the queue is full; the line that says so is no warning


def _nodes(folder: str) -> Iterator[ast.AST]:
    for path in (ROOT / folder).rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def said() -> list[str]:
    """The constant parts of the program's texts."""
    nodes = (node for folder in ("infoxlm_ds", "data_prep") for node in _nodes(folder))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("entry", ABOUT, ids=lambda entry: entry.title)
def test_its_messages_are_those_of_the_program(entry: Entry, said: list[str]) -> None:
    """The parts between ellipses must each be a part of one text in the code."""
    for block in re.findall(r"```text\n(.*?)```", entry.text, re.DOTALL):
        for part in re.split("…|\n|[;:] ", block):
            assert any(part.strip(" .,") in text for text in said), part


@pytest.mark.parametrize("entry", ABOUT, ids=lambda entry: entry.title)
def test_its_messages_lead_to_it(entry: Entry) -> None:
    for pattern in entry.messages:
        message = re.sub(r"\\(.)", r"\1", pattern.replace(".*", "this"))
        assert pointer(f"rank 1: {message} or so") == f" {leads_to(entry.title)}"


def test_each_symptom_is_caused_in_a_test() -> None:
    """In one that looks where the program's message leads to."""
    calls = [node for node in _nodes("tests") if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    arguments = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "leads_to"]
    titles = {argument.value for argument in arguments if isinstance(argument, ast.Constant)}
    assert titles == {entry.title for entry in ABOUT} - {USUAL}


def test_a_message_without_an_entry_leads_nowhere() -> None:
    assert pointer("nowhere.yaml: no such recipe") == ""


def test_the_command_shows_entries_by_title_message_and_words() -> None:
    listed = infoxlm_here("trouble").stdout.splitlines()
    assert listed == [entry.title for entry in entries()]
    for asked in ("the disk is full", "infoxlm: the last checkpoint could not be written: no space", "prune keep"):
        shown = infoxlm_here("trouble", asked)
        assert shown.returncode == 0 and "## The disk is full" in shown.stdout, asked
    unknown = infoxlm_here("trouble", "unicorns")
    assert unknown.returncode == 2 and "`infoxlm trouble` lists them" in unknown.stderr
