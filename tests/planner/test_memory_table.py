"""docs/memory.md: its table has the planner's figures."""

from __future__ import annotations

import re

import pytest

from infoxlm_ds import shipped
from infoxlm_ds.planner.memory import Memory, memory, stages
from infoxlm_ds.planner.report import GIB, Wishes, read_setting
from tests.corpus import ROOT

QUARTER = ["batch.mmlm_tokens=16384", "batch.tlm_tokens=4096", "batch.xlco_pairs=32", "batch.lanes=64"]
CHECKPOINTING = ["memory.activation_checkpointing=true"]
# For each row of the table, in its order.
SETTINGS = [
    ("base", []),
    ("base", QUARTER),
    ("base", QUARTER),
    ("base", QUARTER + CHECKPOINTING),
    ("large", []),
    ("large", CHECKPOINTING),
    ("xl", []),
    ("xl", []),
    ("xl", []),
    ("xl", ["engine=zero3_bf16_offload"]),
    ("xl", ["engine=zero3_bf16_offload"]),
]
ROWS = re.findall(r"^\| (?:base|large|xl|the same).*", (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("row", "setting"), zip(ROWS, SETTINGS, strict=True))
def test_a_row_has_the_figures_of_the_plan(row: str, setting: tuple[str, list[str]]) -> None:
    _, gpus, *cells = (cell.strip() for cell in row.strip("|").split("|"))
    name, overrides = setting
    planned = read_setting(shipped.RECIPES[name], overrides, Wishes(int(gpus), vocabulary=250002))
    by_stage = {variant.stage: memory(variant) for variant in stages(planned)}
    assert cells[:3] == [_cell(by_stage[stage]) if stage in by_stage else "" for stage in (1, 2, 3)]
    assert cells[3] == f"{(by_stage[3].activations + by_stage[3].logits) / GIB:.1f}"


def _cell(needed: Memory) -> str:
    host = f", and {needed.host / GIB:.1f} on the host" if needed.host else ""
    return f"{needed.peak / GIB:.1f}{host}"
