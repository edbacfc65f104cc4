"""TV-L1 at one pyramid scale: the algorithm on one screen, its steps in the modules beside it."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipelines.tvl1.kernels.field import FLOW_U, FLOW_V, OPTIONS, Size, fill_halo
from pipelines.tvl1.kernels.iteration import iterate
from pipelines.tvl1.kernels.median import filter_median
from pipelines.tvl1.kernels.schedule import Schedule
from pipelines.tvl1.kernels.tiles import find_runs, keep_moving, measure_change
from pipelines.tvl1.kernels.warping import linearise, warp


@njit(**OPTIONS)
def solve_scale(
    field: np.ndarray,
    size: Size,
    images: tuple[np.ndarray, np.ndarray],
    scratch: tuple[np.ndarray, ...],
    schedule: Schedule,
) -> None:
    """Refine the flow in the field between two padded images: warp, linearise, iterate and filter, again and again.

    scratch: warped image (H, W); per tile whether it takes part in this scale, whether it moves in this warp, and its
    last change; and the runs of moving tiles. A tile at rest keeps its flow and borders its neighbours.
    """
    warped, alive, active, change, columns, counts = scratch
    runs = columns, counts
    alive[:] = True
    for _ in range(schedule.num_warps):
        active[:] = alive
        if find_runs(active, runs) == 0:
            break
        fill_halo(field, size)
        warp(field, size, runs, images[1], warped)
        linearise(field, size, runs, images[0], warped)
        done = 0
        while done < schedule.num_iterations:
            check = schedule.first_check if done < schedule.first_check else done + schedule.check_every
            until = min(check, schedule.num_iterations)
            iterate(field, size, runs, schedule, until - done, until == check)
            done = until
            if done < check:
                break
            measure_change(field, size, active, change)
            if done == schedule.first_check:
                keep_moving(alive, change, schedule.drop_below)
            keep_moving(active, change, schedule.freeze_below)
            if find_runs(active, runs) == 0:
                break
        if schedule.median == 3:
            active[:] = True
            find_runs(active, runs)
            filter_median(field, size, FLOW_U, runs)
            filter_median(field, size, FLOW_V, runs)
