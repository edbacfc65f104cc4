"""The memory that one pyramid scale is solved in, and how to find a pixel in it.

One flat float32 array, the field, holds everything that an iteration touches. The frame is cut in vertical strips of
STRIP columns. Inside a strip, each image row is PLANES consecutive runs of PITCH floats: the flow u and v, the
linearised data term, the change, and the duals of u and v. So pixel (y, x) of plane P lies at

    strip_base(x // STRIP) + y * ROW + P + x % STRIP

with every distance a compile-time constant: the compiler sees that no store hits a later load, and one compilation
gives 16-wide code for any image width. Three rules keep it so, each worth up to a factor of 8: unsigned indices (no
wrap-around test), float32 constants (no double), u and v at least 2 KiB before the duals (store forwarding).

Halo. Between two planes lie PITCH - STRIP unused floats; column STRIP holds a copy of the next strip's first u and v,
column -1 a copy of the previous strip's last p_x. Each strip has one spare row above row 0.
"""

from __future__ import annotations

import numpy as np
from numba import njit

U, F = np.uint64, np.float32
OPTIONS = {"fastmath": True, "error_model": "numpy", "boundscheck": False, "nogil": True, "cache": True}

LANES = 16
TILE = 16
STRIP = 256
PITCH = STRIP + LANES
PLANES = 11
ROW = PLANES * PITCH
FLOW_U, FLOW_V, GRAD_X, GRAD_Y, RHO, INVERSE, CHANGE, DUAL_UX, DUAL_UY, DUAL_VX, DUAL_VY = (
    U(plane * PITCH) for plane in range(PLANES)
)
ROW_U, ONE, STRIP_U = U(ROW), U(1), U(STRIP)
ZERO_F, ONE_F, HALF_F = F(0), F(1), F(0.5)

Size = tuple[int, int]  # height, width
Runs = tuple[np.ndarray, np.ndarray]  # per band of 16 rows: (first column, pixels) of each run, and the number of runs
Index = np.uint64 | int
Real = np.float32 | float


def field_size(height: int, width: int) -> int:
    """Floats in the field of a scale."""
    return -(-width // STRIP) * ((height + 1) * ROW + LANES) + LANES


@njit(forceinline=True, **OPTIONS)
def strip_base(strip: int, height: int) -> np.uint64:
    """Index of pixel (0, 0) of a strip in plane 0."""
    return U(strip * ((height + 1) * ROW + LANES) + LANES + ROW)


@njit(forceinline=True, **OPTIONS)
def index_of(y: int, x: int, height: int) -> np.uint64:
    """Index of pixel (y, x) in plane 0."""
    return strip_base(x // STRIP, height) + U(y * ROW + x % STRIP)


@njit(forceinline=True, **OPTIONS)
def exchange_halo(field: np.ndarray, o: Index, n: int, x: int, size: Size) -> None:
    """Refresh what depends on the n pixels from column x (index o) just computed, at the borders of strips.

    The previous strip gets this row's first u and v, the next one the last p_x of the row above; at the frame's right
    edge u and v repeat, which makes the x-gradient 0 there.
    """
    height, width = size
    stride = U((height + 1) * ROW + LANES)
    if x > 0 and x % STRIP == 0:
        left = o - stride + STRIP_U
        field[left + FLOW_U], field[left + FLOW_V] = field[o + FLOW_U], field[o + FLOW_V]
    end = x + n
    if end >= width:
        edge = o + U(width - 1 - x)
        field[edge + FLOW_U + ONE], field[edge + FLOW_V + ONE] = field[edge + FLOW_U], field[edge + FLOW_V]
    elif end % STRIP == 0:
        pass_dual_on(field, o + U(n - 1) - ROW_U, stride)


@njit(forceinline=True, **OPTIONS)
def pass_dual_on(field: np.ndarray, last: Index, stride: Index) -> None:
    """Copy p_x of a strip's last column (index `last`) to column -1 of the next strip."""
    right = last + stride - STRIP_U
    field[right + DUAL_UX], field[right + DUAL_VX] = field[last + DUAL_UX], field[last + DUAL_VX]


@njit(**OPTIONS)
def fill_halo(field: np.ndarray, size: Size) -> None:
    """Set all halo columns from the strips beside them, and the columns right of the frame from its last one."""
    height, width = size
    stride = U((height + 1) * ROW + LANES)
    rounded = (width + LANES - 1) // LANES * LANES
    for y in range(height):
        for x0 in range(0, width, STRIP):
            o = index_of(y, x0, height)
            exchange_halo(field, o, min(STRIP, width - x0), x0, size)
            if x0 + STRIP < width:
                pass_dual_on(field, o + STRIP_U - ONE, stride)
        edge = index_of(y, width - 1, height)
        for x in range(U(1), U(rounded - width + 1)):
            field[edge + FLOW_U + x], field[edge + FLOW_V + x] = field[edge + FLOW_U], field[edge + FLOW_V]


@njit(**OPTIONS)
def row_buffer(width: int) -> np.ndarray:
    return np.empty(width + 2 + LANES, np.float32)


@njit(**OPTIONS)
def read_row(field: np.ndarray, y: int, size: Size, plane: Index, row: np.ndarray) -> None:
    """Row y of a plane as row[1:W+1], its ends repeated in row[0] and row[W+1]."""
    height, width = size
    for x0 in range(0, width, STRIP):
        o = index_of(y, x0, height) + plane
        out = row[1 + x0 : 1 + min(x0 + STRIP, width)]
        for x in range(U(out.size)):
            out[x] = field[o + x]
    row[0], row[width + 1] = row[1], row[width]


@njit(**OPTIONS)
def read_flow(field: np.ndarray, size: Size, out: np.ndarray) -> None:
    """u and v of the field as (H, W, 2)."""
    height, width = size
    for y in range(height):
        for x0 in range(0, width, STRIP):
            o = index_of(y, x0, height)
            for x in range(min(STRIP, width - x0)):
                out[y, x0 + x, 0], out[y, x0 + x, 1] = field[o + FLOW_U + U(x)], field[o + FLOW_V + U(x)]
