"""Products of many cases: some in the suite, all of them in `make torture`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def product(*factors: Iterable[Any], suite: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Every combination, as parameters of a test. Those not in `suite` run in `make torture` alone."""
    return cases(list(itertools.product(*factors)), suite)


def cases(everything: Sequence[tuple[Any, ...]], suite: Sequence[tuple[Any, ...]]) -> list[Any]:
    """As `product`, of combinations that are listed."""
    assert set(suite) <= set(everything)
    return [pytest.param(*case, marks=() if case in suite else pytest.mark.torture) for case in everything]
