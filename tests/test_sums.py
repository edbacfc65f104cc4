"""Sums over clips, and what counts as right."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.training.sums import Sums, count_hits


def test_sums_are_read_once() -> None:
    sums = Sums(torch.device("cpu"))
    sums.add(loss=torch.tensor(1.5), clips=2)
    sums.add(loss=0.5)
    assert {name: value for name, value in sums.reduce().items() if value} == {"loss": 2.0, "clips": 2.0}
    assert set(sums.reduce().values()) == {0.0}


def test_hits_count_with_their_weights() -> None:
    scores = torch.tensor([[3.0, 1, 2], [0, 5, 4], [9, 8, 7]])
    hits = count_hits(scores, torch.tensor([0, 2, 0]), torch.tensor([1.0, 1.0, 0.0]))
    assert (hits["top1"].item(), hits["top5"].item()) == (1, 2)


@pytest.mark.parametrize("broken", [[math.nan] * 3, [math.nan, 1, 2], [0, math.inf, math.inf]])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_score_that_is_not_finite_is_never_right(broken: list[float], label: int) -> None:
    hits = count_hits(torch.tensor([broken]), torch.tensor([label]), torch.ones(1))
    assert (hits["top1"].item(), hits["top5"].item()) == (0, 0)
