"""The second image at x + flow, and the data term linearised around it."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pipelines.tvl1.kernels.field import (
    FLOW_U,
    FLOW_V,
    GRAD_X,
    GRAD_Y,
    HALF_F,
    INVERSE,
    ONE,
    ONE_F,
    OPTIONS,
    RHO,
    STRIP,
    STRIP_U,
    TILE,
    ZERO_F,
    F,
    Index,
    Real,
    Runs,
    Size,
    U,
    index_of,
    row_buffer,
)
from pipelines.tvl1.kernels.tiles import sum_of
from pipelines.tvl1.kernels.vectors import use_widest_vectors

CUBIC = F(-0.75)
FLAT = F(1e-6)  # squared gradient below which a pixel says nothing about its motion

Taps = tuple[np.ndarray, np.ndarray, np.ndarray]  # of one strip's row: 8 weights, top left tap, 4 blended columns each
Position = tuple[int, float, int, int, float, float]


@njit(**OPTIONS)
def warp(field: np.ndarray, size: Size, runs: Runs, image: np.ndarray, warped: np.ndarray) -> None:
    """The padded second image at x + flow, into warped (H, W), where the runs and the pixels around them need it."""
    height, width = size
    pitch = image.size // (height + 3)
    taps = np.empty(8 * STRIP, np.float32), np.empty(STRIP, np.int32), np.empty(4 * STRIP, np.float32)
    for y in range(height):
        first, last = needed_columns(runs, y, size)
        for x0 in range(first // STRIP * STRIP, last, STRIP):
            x, end = max(first, x0), min(last, x0 + STRIP)
            o = index_of(y, x, height)
            position = np.int32(x), F(y), U(max(end - x, 0)), np.int32(pitch), F(width - 1), F(height - 1)
            locate_taps(field, o, position, taps)
            gather_cubic(image, U(pitch), taps, warped[y, x:end])


@njit(**OPTIONS)
def needed_columns(runs: Runs, y: int, size: Size) -> tuple[int, int]:
    """Columns [first, last) of row y that a central difference inside the runs reads."""
    height, width = size
    columns, counts = runs
    first, last = width, 0
    for band in range(max(y - 1, 0) // TILE, min(y + 1, height - 1) // TILE + 1):
        if counts[band] > 0:
            first = min(first, columns[band, 0, 0] - 1)
            last = max(last, sum_of(columns[band, counts[band] - 1]) + 1)
    return max(first, 0), min(last, width)


@njit(forceinline=True, **OPTIONS)
def locate_taps(field: np.ndarray, o: Index, position: Position, taps: Taps) -> None:
    """For a strip's n pixels from index o: where their flow leads, as eight weights and the top left tap of each.

    position: x and y of the first pixel, n, the padded image's pitch, and the last column and row, to which clamped.
    """
    use_widest_vectors()
    x0, y, n, pitch, right, bottom = position
    weights, corners, _ = taps
    for k in range(n):
        px = min(max(F(x0 + np.int32(k)) + field[o + FLOW_U + k], ZERO_F), right)
        py = min(max(y + field[o + FLOW_V + k], ZERO_F), bottom)
        ix, iy = np.int32(px), np.int32(py)
        wx, wy = cubic_weights(px - F(ix)), cubic_weights(py - F(iy))
        weights[k], weights[k + STRIP_U], weights[k + U(2) * STRIP_U], weights[k + U(3) * STRIP_U] = wx
        weights[k + U(4) * STRIP_U], weights[k + U(5) * STRIP_U] = wy[0], wy[1]
        weights[k + U(6) * STRIP_U], weights[k + U(7) * STRIP_U] = wy[2], wy[3]
        corners[k] = iy * pitch + ix


@njit(forceinline=True, **OPTIONS)
def cubic_weights(f: Real) -> tuple[Real, Real, Real, Real]:
    """Weights of the pixels at -1, 0, 1, 2 for an offset f in [0, 1]: the cubic kernel with a = -0.75, as OpenCV's."""
    g = ONE_F - f
    w0 = CUBIC * f * g * g
    w3 = CUBIC * g * f * f
    w1 = ((CUBIC + F(2)) * f - (CUBIC + F(3))) * f * f + ONE_F
    return w0, w1, ONE_F - w0 - w1 - w3, w3


@intrinsic
def blend_taps(_: Any, image: Any, corner: Any, pitch: Any, weights: Any, k: Any, columns: Any) -> Any:
    """columns[4k + j] = sum over i of weights[k + (4 + i) * STRIP] * image[corner + i * pitch + j], for j = 0..3.

    The only hand-emitted vector code: numba runs no superword vectoriser, so the plain form of these four sums is
    scalar, and the whole gather then takes 2.9 instead of 1.3 ns a pixel.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        data = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        image, corner, pitch, weights, k, columns = data
        quad, lanes = ir.VectorType(ir.FloatType(), 4), ir.VectorType(ir.IntType(32), 4)
        undefined, total = ir.Constant(quad, ir.Undefined), ir.Constant(quad, [0.0] * 4)
        for i in range(4):
            row = builder.gep(image, [builder.add(corner, builder.mul(pitch, pitch.type(i)))])
            pixels = builder.load(builder.bitcast(row, quad.as_pointer()), align=4)
            weight = builder.load(builder.gep(weights, [builder.add(k, k.type((4 + i) * STRIP))]))
            weight = builder.insert_element(undefined, weight, ir.IntType(32)(0))
            weight = builder.shuffle_vector(weight, undefined, ir.Constant(lanes, [0] * 4))
            total = builder.fadd(total, builder.fmul(pixels, weight, flags=["fast"]), flags=["fast"])
        target = builder.gep(columns, [builder.mul(k, k.type(4))])
        builder.store(total, builder.bitcast(target, quad.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(image, corner, pitch, weights, k, columns), emit


@njit(forceinline=True, **OPTIONS)
def gather_cubic(image: np.ndarray, pitch: Index, taps: Taps, out: np.ndarray) -> None:
    """Bicubic value of the padded image at each located pixel: taps blended over y, then the four columns over x."""
    use_widest_vectors()
    weights, corners, columns = taps
    for k in range(U(out.size)):
        blend_taps(image, U(corners[k]), pitch, weights, k, columns)
    for k in range(U(out.size)):
        c = U(4) * k
        x0, x1 = weights[k], weights[k + STRIP_U]
        x2, x3 = weights[k + U(2) * STRIP_U], weights[k + U(3) * STRIP_U]
        out[k] = x0 * columns[c] + x1 * columns[c + ONE] + x2 * columns[c + U(2)] + x3 * columns[c + U(3)]


@njit(**OPTIONS)
def linearise(field: np.ndarray, size: Size, runs: Runs, image: np.ndarray, warped: np.ndarray) -> None:
    """Data term of the runs around the current flow: rho(u') = I1(x+u) - I0 + grad . (u' - u).

    grad is the central difference of the warped image; INVERSE is 1 / |grad|^2, or 0 where the image is flat.
    """
    height, width = size
    columns, counts = runs
    pitch = image.size // (height + 3)
    row = row_buffer(width)
    for y in range(height):
        if counts[y // TILE] == 0:
            continue
        copy_row(warped[y], row[1:])
        row[0], row[width + 1] = row[1], row[width]
        for r in range(counts[y // TILE]):
            x = columns[y // TILE, r, 0]
            end = min(x + columns[y // TILE, r, 1], width)
            start = (y + 1) * pitch + 1 + x
            above, below = warped[max(y - 1, 0), x:end], warped[min(y + 1, height - 1), x:end]
            linearise_run(field, index_of(y, x, height), (image[start : start + end - x], above, row[x:], below))


@njit(forceinline=True, **OPTIONS)
def copy_row(source: np.ndarray, out: np.ndarray) -> None:
    use_widest_vectors()
    for x in range(U(source.size)):
        out[x] = source[x]


@njit(forceinline=True, **OPTIONS)
def linearise_run(field: np.ndarray, o: Index, rows: tuple[np.ndarray, ...]) -> None:
    use_widest_vectors()
    image, above, row, below = rows
    for k in range(U(image.size)):
        i = o + k
        gx = HALF_F * (row[k + U(2)] - row[k])
        gy = HALF_F * (below[k] - above[k])
        square = gx * gx + gy * gy
        field[i + GRAD_X], field[i + GRAD_Y] = gx, gy
        field[i + RHO] = row[k + ONE] - image[k] - gx * field[i + FLOW_U] - gy * field[i + FLOW_V]
        field[i + INVERSE] = ONE_F / max(square, FLAT)
