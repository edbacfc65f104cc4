"""Figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation import metrics

SCORES = np.array([[3, 1, 2], [0, 5, 4], [9, 8, 7], [1, 1, 1]], np.float32)
LABELS = np.array([0, 2, 2, 1])


def test_ranks_count_the_classes_before_the_true_one() -> None:
    assert metrics.ranks(SCORES, LABELS).tolist() == [0, 1, 2, 1]  # a tie goes to the class that comes first


@pytest.mark.parametrize("broken", [[np.nan, np.nan], [np.nan, 1.0], [0.0, np.nan], [np.inf, 0.0]])
@pytest.mark.parametrize("label", [0, 1])
def test_a_video_with_a_score_that_is_not_finite_is_never_right(broken: list[float], label: int) -> None:
    scores, labels = np.array([broken, [2.0, 1.0]]), np.array([label, 0])
    assert metrics.ranks(scores, labels).tolist() == [2, 0]
    assert metrics.top(1, scores, labels, 2) == 0.5
    assert metrics.confusion(scores, labels).tolist() == [[1, 0], [0, 0]]


def test_top_k_counts_lost_videos_as_wrong() -> None:
    assert metrics.top(1, SCORES, LABELS, 4) == 0.25
    assert metrics.top(2, SCORES, LABELS, 4) == 0.75
    assert metrics.top(2, SCORES, LABELS, 6) == 0.5


def test_top_k_of_k_classes_says_nothing() -> None:
    assert metrics.top(3, SCORES, LABELS, 4) is None
    assert metrics.top(1, SCORES[:0], LABELS[:0], 0) is None


def test_confusion_and_classes() -> None:
    matrix = metrics.confusion(SCORES, LABELS)
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert metrics.per_class(matrix, [2, 1, 0]) == [0.5, 0, None]


def test_wilson_intervals_as_in_the_tables() -> None:
    assert metrics.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = metrics.wilson(1.0, 10)
    assert (round(low, 4), high) == (0.7225, 1.0)
