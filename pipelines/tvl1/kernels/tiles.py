"""Which tiles of 16x16 pixels still move: they are iterated in runs, the others rest."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipelines.tvl1.kernels.field import CHANGE, OPTIONS, STRIP, TILE, ZERO_F, F, Real, Runs, Size, U, index_of


@njit(**OPTIONS)
def find_runs(active: np.ndarray, runs: Runs) -> int:
    """Per band of tiles, the runs (first column, pixels) of active tiles, cut at strips; returns the active tiles."""
    columns, counts = runs
    total = 0
    for band in range(active.shape[0]):
        count = 0
        for tile in range(active.shape[1]):
            x = tile * TILE
            if not active[band, tile]:
                continue
            total += 1
            if count > 0 and sum_of(columns[band, count - 1]) == x and x % STRIP != 0:
                columns[band, count - 1, 1] += TILE
            else:
                columns[band, count, 0], columns[band, count, 1] = x, TILE
                count += 1
        counts[band] = count
    return total


@njit(forceinline=True, **OPTIONS)
def sum_of(pair: np.ndarray) -> int:
    return pair[0] + pair[1]


@njit(**OPTIONS)
def measure_change(field: np.ndarray, size: Size, active: np.ndarray, change: np.ndarray) -> None:
    """Mean squared change (H/16, W/16) of u and v in the last iteration, for the active tiles only."""
    height, width = size
    for band in range(active.shape[0]):
        y1 = min((band + 1) * TILE, height)
        for tile in range(active.shape[1]):
            if not active[band, tile]:
                continue
            x0 = tile * TILE
            n = min(TILE, width - x0)
            total = ZERO_F
            for y in range(band * TILE, y1):
                o = index_of(y, x0, height) + CHANGE
                for x in range(U(n)):
                    total += field[o + x]
            change[band, tile] = total / F(n * (y1 - band * TILE))


@njit(**OPTIONS)
def keep_moving(tiles: np.ndarray, change: np.ndarray, threshold: Real) -> None:
    """Clear every tile of `tiles` whose change, and that of its eight neighbours, is below the threshold."""
    bands, width = change.shape
    for band in range(bands):
        for tile in range(width):
            largest = ZERO_F
            for b in range(max(band - 1, 0), min(band + 2, bands)):
                for t in range(max(tile - 1, 0), min(tile + 2, width)):
                    largest = max(largest, change[b, t])
            if largest < threshold:
                tiles[band, tile] = False
