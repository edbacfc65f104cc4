"""Grids of cases of which every run takes the known bad ones and a sample, and `make test-soak` the rest."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def sampled(*axes: Iterable[Any], is_known: Callable[..., bool], count: int = 10, seed: int = 0) -> Collection[Any]:
    """Every combination of the axes, as parameters; those neither known nor among the sample are marked soak."""
    grid = list(itertools.product(*axes))
    chosen = random.Random(seed).sample(grid, count) + [case for case in grid if is_known(*case)]
    return [pytest.param(*case, marks=() if case in chosen else pytest.mark.soak) for case in grid]
