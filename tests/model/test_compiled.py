"""Layers whose part after attention is compiled give the numbers of layers that are not, from few graphs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from infoxlm_ds.model.families import FAMILIES
from tests.corpus import ROOT

# In a process of its own: the tests switch torch's compiler off. `aot_eager` traces as on a GPU, but needs no compiler.
COMPARE = """
import copy, functools, sys
import numpy as np, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
from torch._dynamo.utils import counters
from infoxlm_ds.config import Model
from infoxlm_ds.data.flat_batch import flat_batch, make_layout
from infoxlm_ds.model.families import FAMILIES
from infoxlm_ds.model.pretrained import build_model

for family in sys.argv[1:]:
    tree = {"layers": 3, "width": 48, "heads": 4, "feed_forward": 96, "positions": 64, "universal_layer": 2}
    shape = Model.model_validate(tree | {"pooling": "cls"}).model_copy(update={"type": family})
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = build_model(shape, 100, 1), build_model(shape, 100, 1)
    compiled.compiled = True
    for lengths in ([5, 9, 7], [12, 3, 3, 8]):
        lengths = np.array(lengths)
        tokens = flat_batch(np.arange(lengths.sum()) % 90 + 5, lengths)
        rows = torch.arange(0, int(lengths[:2].sum()), 2)
        made = [m(tokens, make_layout(lengths[:2]), make_layout(lengths[2:]), rows) for m in (plain, compiled)]
        for ours, expected in zip(made[1], made[0], strict=True):
            torch.testing.assert_close(ours, expected)
        for states, vectors in made:
            (states.square().mean() + vectors.square().mean() + vectors[0, 0]).backward()
    copies = [copy.deepcopy(m.sentence_encoder()).eval().requires_grad_(False) for m in (plain, compiled)]
    with torch.no_grad():  # the key encoder; queries in a pass of their own; one row
        for lengths in ([4, 8, 6], [11]):
            tokens = flat_batch(np.arange(sum(lengths)) + 5, np.array(lengths))
            for ours, expected in ((copies[1], copies[0]), (compiled.sentence_encoder(), plain.sentence_encoder())):
                torch.testing.assert_close(ours(tokens), expected(tokens))
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)
    assert not counters["graph_break"], counters["graph_break"]
    print(family, counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers_from_few_graphs() -> None:
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", COMPARE, *FAMILIES], env=environment, capture_output=True, text=True, timeout=250
    )
    assert found.returncode == 0, found.stderr[-2000:]
    graphs = {family: int(n) for family, n in (line.split() for line in found.stdout.splitlines())}
    assert graphs.keys() == FAMILIES.keys()
    assert max(graphs.values()) <= 8  # of 3 layers, with and without gradients, in training or not, for one row or many
