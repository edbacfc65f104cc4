"""The primal-dual iteration, where two thirds of the time go: one fused loop over each run of a row."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pipelines.tvl1.kernels.field import (
    CHANGE,
    DUAL_UX,
    DUAL_UY,
    DUAL_VX,
    DUAL_VY,
    FLOW_U,
    FLOW_V,
    GRAD_X,
    GRAD_Y,
    INVERSE,
    LANES,
    ONE,
    ONE_F,
    OPTIONS,
    RHO,
    ROW,
    ROW_U,
    STRIP,
    STRIP_U,
    TILE,
    ZERO_F,
    Index,
    Real,
    Runs,
    Size,
    U,
    exchange_halo,
    index_of,
    pass_dual_on,
    strip_base,
)
from pipelines.tvl1.kernels.schedule import Schedule
from pipelines.tvl1.kernels.vectors import use_widest_vectors


@njit(forceinline=True, **OPTIONS)
def iterate_row(
    field: np.ndarray, o: Index, n: Index, coupling: Real, data_step: Real, dual_step: Real, measure: bool
) -> None:
    """Primal step of n pixels of row y (from index o), then dual step of the same columns of row y - 1.

    Primal: u <- u + t * grad + theta * div p, with t = clamp(-rho(u) / |grad|^2, +-lambda * theta).
    Dual: p <- (p + s * grad u) / (1 + s * |grad u|), with s = tau / theta; its row y - 1 needs the new u
    of rows y - 1 and y. Both reciprocals come from one division. n is a multiple of 16.
    """
    use_widest_vectors()
    for x in range(n):
        i = o + x
        k = i - ROW_U
        u, v, gx, gy = field[i + FLOW_U], field[i + FLOW_V], field[i + GRAD_X], field[i + GRAD_Y]
        t = -(field[i + RHO] + gx * u + gy * v) * field[i + INVERSE]
        t = min(max(t, -data_step), data_step)
        uy, vy = field[k + DUAL_UY], field[k + DUAL_VY]
        du = t * gx + coupling * (field[i + DUAL_UX] - field[i + DUAL_UX - ONE] + field[i + DUAL_UY] - uy)
        dv = t * gy + coupling * (field[i + DUAL_VX] - field[i + DUAL_VX - ONE] + field[i + DUAL_VY] - vy)
        u, v = u + du, v + dv
        field[i + FLOW_U], field[i + FLOW_V] = u, v
        if measure:
            field[i + CHANGE] = du * du + dv * dv
        above_u, above_v = field[k + FLOW_U], field[k + FLOW_V]
        u_x, u_y = field[k + FLOW_U + ONE] - above_u, u - above_u
        v_x, v_y = field[k + FLOW_V + ONE] - above_v, v - above_v
        norm_u = ONE_F + dual_step * math.sqrt(u_x * u_x + u_y * u_y)
        norm_v = ONE_F + dual_step * math.sqrt(v_x * v_x + v_y * v_y)
        both = ONE_F / (norm_u * norm_v)
        scale_u, scale_v = both * norm_v, both * norm_u
        field[k + DUAL_UX] = (field[k + DUAL_UX] + dual_step * u_x) * scale_u
        field[k + DUAL_UY] = (uy + dual_step * u_y) * scale_u
        field[k + DUAL_VX] = (field[k + DUAL_VX] + dual_step * v_x) * scale_v
        field[k + DUAL_VY] = (vy + dual_step * v_y) * scale_v


@njit(forceinline=True, **OPTIONS)
def iterate_last_dual_row(field: np.ndarray, o: Index, n: Index, dual_step: Real) -> None:
    """Dual step of n pixels of the last row, where the y-gradient is 0."""
    use_widest_vectors()
    for x in range(n):
        i = o + x
        u_x = dual_step * (field[i + FLOW_U + ONE] - field[i + FLOW_U])
        field[i + DUAL_UX] = (field[i + DUAL_UX] + u_x) / (ONE_F + abs(u_x))
        v_x = dual_step * (field[i + FLOW_V + ONE] - field[i + FLOW_V])
        field[i + DUAL_VX] = (field[i + DUAL_VX] + v_x) / (ONE_F + abs(v_x))


@njit(**OPTIONS)
def clear_above(field: np.ndarray, size: Size) -> None:
    """Set the duals above row 0 to 0: div p takes nothing from outside of the frame."""
    height, width = size
    for strip in range((width + STRIP - 1) // STRIP):
        o = strip_base(strip, height) - ROW_U
        for x in range(STRIP_U):
            field[o + DUAL_UY + x] = ZERO_F
            field[o + DUAL_VY + x] = ZERO_F


@njit(**OPTIONS)
def iterate(field: np.ndarray, size: Size, runs: Runs, schedule: Schedule, count: int, measure: bool) -> None:
    """`count` primal-dual iterations over the runs of active tiles; the others keep u and p and act as a fixed border.

    They go down the frame together, one row apart: the same result as one after the other, but a row that the first
    has brought into the cache is still there for the others. The last one measures the change where `measure` is set.
    """
    height = size[0]
    columns, counts = runs
    for front in range(height + count - 1):
        for behind in range(max(front - height + 1, 0), min(front + 1, count)):
            y = front - behind
            if y == 0:
                clear_above(field, size)
            for r in range(counts[y // TILE]):
                x, n = columns[y // TILE, r, 0], columns[y // TILE, r, 1]
                o = index_of(y, x, height)
                if measure and behind == count - 1:
                    iterate_row(field, o, U(n), schedule.coupling, schedule.data_step, schedule.dual_step, True)
                else:
                    iterate_row(field, o, U(n), schedule.coupling, schedule.data_step, schedule.dual_step, False)
                exchange_halo(field, o, n, x, size)
            if y == height - 1:
                iterate_last_duals(field, size, runs, schedule)


@njit(**OPTIONS)
def iterate_last_duals(field: np.ndarray, size: Size, runs: Runs, schedule: Schedule) -> None:
    """Dual step of the runs of the last row."""
    height, width = size
    columns, counts = runs
    for r in range(counts[(height - 1) // TILE]):
        x, n = columns[(height - 1) // TILE, r, 0], columns[(height - 1) // TILE, r, 1]
        o = index_of(height - 1, x, height)
        iterate_last_dual_row(field, o, U(min(n, width - x)), schedule.dual_step)
        if x + n < width and (x + n) % STRIP == 0:
            pass_dual_on(field, o + U(n - 1), U((height + 1) * ROW + LANES))
