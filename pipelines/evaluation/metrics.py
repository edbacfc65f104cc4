"""Accuracy from logits, in numpy: what an evaluation reports.

Ties go to the class that comes first. Where a score of a video is not finite, its network has diverged or overflowed
and says nothing: its true class comes last, and it was taken for no class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]  # (videos, classes)
Labels = npt.NDArray[np.integer]  # (videos,)


def ranks(scores: Scores, labels: Labels) -> npt.NDArray[np.int64]:
    """How many classes come before the true one, per video; 0 is right."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    # NaN is neither larger nor smaller than anything: no class would come before the true one.
    valid = np.isfinite(scores).all(axis=1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return np.where(valid, before.sum(axis=1), scores.shape[1])


def top(k: int, scores: Scores, labels: Labels, expected: int) -> float | None:
    """Share of `expected` videos whose true class is among the first k; videos without scores count as wrong.

    None where there are no more than k classes, or no video.
    """
    if expected == 0 or (k > 1 and scores.shape[1] <= k):
        return None
    return float((ranks(scores, labels) < k).sum()) / expected


def confusion(scores: Scores, labels: Labels) -> npt.NDArray[np.int64]:
    """(classes, classes): videos of the true class in the row that were taken for the class in the column.

    Videos that were taken for none, because a score is not finite, are not in it.
    """
    matrix = np.zeros((scores.shape[1],) * 2, np.int64)
    valid = np.isfinite(scores).all(axis=1)
    np.add.at(matrix, (labels[valid], scores[valid].argmax(axis=1)), 1)  # argmax takes NaN for the largest
    return matrix


def per_class(matrix: npt.NDArray[np.int64], expected: Sequence[int]) -> list[float | None]:
    """Each class's share of its `expected` videos that are right; None for a class without videos."""
    right = matrix.diagonal().tolist()
    return [hits / count if count else None for hits, count in zip(right, expected, strict=True)]


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent trials (Wilson 1927)."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Only rounding can lead beyond 0 and 1.
    return max(0.0, centre - half), min(1.0, centre + half)
