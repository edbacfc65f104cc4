"""3x3 median of the flow, as minima and maxima, 16 pixels at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipelines.tvl1.kernels.field import (
    ONE,
    OPTIONS,
    TILE,
    Index,
    Real,
    Runs,
    Size,
    U,
    index_of,
    read_row,
    row_buffer,
)
from pipelines.tvl1.kernels.vectors import use_widest_vectors


@njit(**OPTIONS)
def filter_median(field: np.ndarray, size: Size, plane: Index, runs: Runs) -> None:
    """3x3 median of one flow plane over the runs, in place, edges repeated."""
    height, width = size
    columns, counts = runs
    above, row, below = row_buffer(width), row_buffer(width), row_buffer(width)
    read_row(field, 0, size, plane, row)
    above[:] = row
    for y in range(height):
        if y + 1 < height:
            read_row(field, y + 1, size, plane, below)
        else:
            below[:] = row
        for r in range(counts[y // TILE]):
            x = columns[y // TILE, r, 0]
            n = min(columns[y // TILE, r, 1], width - x)
            median_of_nine(field, index_of(y, x, height) + plane, U(n), (above[x:], row[x:], below[x:]))
        above, row, below = row, below, above


@njit(forceinline=True, **OPTIONS)
def median_of_nine(field: np.ndarray, o: Index, n: Index, rows: tuple[np.ndarray, ...]) -> None:
    """Median of the 3x3 pixels around n pixels, from three rows with a pixel more on both sides, into the field.

    Sort each column; the median of nine is the median of (largest low, median middle, smallest high).
    """
    use_widest_vectors()
    above, row, below = rows
    for x in range(n):
        low0, mid0, high0 = sort3(above[x], row[x], below[x])
        low1, mid1, high1 = sort3(above[x + ONE], row[x + ONE], below[x + ONE])
        low2, mid2, high2 = sort3(above[x + U(2)], row[x + U(2)], below[x + U(2)])
        low, high = max(low0, max(low1, low2)), min(high0, min(high1, high2))
        field[o + x] = median3(low, median3(mid0, mid1, mid2), high)


@njit(forceinline=True, **OPTIONS)
def sort3(a: Real, b: Real, c: Real) -> tuple[Real, Real, Real]:
    low, high = min(a, b), max(a, b)
    return min(low, c), max(low, min(high, c)), max(high, c)


@njit(forceinline=True, **OPTIONS)
def median3(a: Real, b: Real, c: Real) -> Real:
    return max(min(a, b), min(max(a, b), c))
