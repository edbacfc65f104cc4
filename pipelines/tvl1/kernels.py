"""The compiled TV-L1 solver of one pyramid scale, in plain numba.

Layout. One flat float32 array, the `field`, holds everything that an iteration touches. The frame is cut in vertical
strips of STRIP columns. Inside a strip, each image row is PLANES consecutive runs of PITCH floats: the flow u and v,
the linearised data term, the change, and the duals of u and v. So pixel (y, x) of plane P lies at

    strip_base(x // STRIP) + y * ROW + P + x % STRIP

with every distance a compile-time constant: the compiler sees that no store hits a later load and emits 16-wide code
for any image width. Three rules keep it so, each worth up to a factor of 8: unsigned indices (no wrap-around test),
float32 constants (no double), u and v at least 2 KiB before the duals (store forwarding).

Halo. Between two planes lie PITCH - STRIP unused floats; column STRIP holds a copy of the next strip's first u and v,
column -1 a copy of the previous strip's last p_x. Each strip has one spare row above row 0.

Z and S in the comments are the papers named in params.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

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
CUBIC = F(-0.75)
FLAT = F(1e-6)  # squared gradient below which a pixel says nothing about its motion


Size = tuple[int, int]  # height, width
Runs = tuple[np.ndarray, np.ndarray]  # per band of 16 rows: (first column, pixels) of each run, and the number of runs
Taps = tuple[np.ndarray, np.ndarray, np.ndarray]  # of one strip's row: 8 weights, top left tap, 4 blended columns each
Position = tuple[int, float, int, int, float, float]
Index = np.uint64 | int
Real = np.float32 | float


class Schedule(NamedTuple):
    """What the solver needs of TVL1Params, with thresholds squared."""

    coupling: np.float32  # theta
    data_step: np.float32  # lambda * theta
    dual_step: np.float32  # tau / theta
    num_warps: int
    num_iterations: int
    median: int
    first_check: int
    check_every: int
    freeze_below: np.float32  # squared pixels
    drop_below: np.float32  # squared pixels


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
def iterate_row(
    field: np.ndarray, o: Index, n: Index, coupling: Real, data_step: Real, dual_step: Real, measure: bool
) -> None:
    """Primal step of n pixels of row y (from index o), then dual step of the same columns of row y - 1.

    Primal (Z eq. 9 and 11): u <- u + t * grad + theta * div p, with t = clamp(-rho(u) / |grad|^2, +-lambda * theta).
    Dual (Z eq. 12): p <- (p + s * grad u) / (1 + s * |grad u|), with s = tau / theta; its row y - 1 needs the new u
    of rows y - 1 and y. Both reciprocals come from one division. n is a multiple of 16.
    """
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
    for x in range(n):
        i = o + x
        u_x = dual_step * (field[i + FLOW_U + ONE] - field[i + FLOW_U])
        field[i + DUAL_UX] = (field[i + DUAL_UX] + u_x) / (ONE_F + abs(u_x))
        v_x = dual_step * (field[i + FLOW_V + ONE] - field[i + FLOW_V])
        field[i + DUAL_VX] = (field[i + DUAL_VX] + v_x) / (ONE_F + abs(v_x))


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
def clear_above(field: np.ndarray, size: Size) -> None:
    """Set the duals above row 0 to 0: div p takes nothing from outside of the frame."""
    height, width = size
    for strip in range((width + STRIP - 1) // STRIP):
        o = strip_base(strip, height) - ROW_U
        for x in range(STRIP_U):
            field[o + DUAL_UY + x] = ZERO_F
            field[o + DUAL_VY + x] = ZERO_F


@njit(**OPTIONS)
def iterate(field: np.ndarray, size: Size, runs: Runs, schedule: Schedule, measure: bool) -> None:
    """One primal-dual iteration over the runs of active tiles; the others keep u and p and act as a fixed border."""
    height, width = size
    columns, counts = runs
    clear_above(field, size)
    for y in range(height):
        for r in range(counts[y // TILE]):
            x, n = columns[y // TILE, r, 0], columns[y // TILE, r, 1]
            o = index_of(y, x, height)
            if measure:
                iterate_row(field, o, U(n), schedule.coupling, schedule.data_step, schedule.dual_step, True)
            else:
                iterate_row(field, o, U(n), schedule.coupling, schedule.data_step, schedule.dual_step, False)
            exchange_halo(field, o, n, x, size)
    for r in range(counts[(height - 1) // TILE]):
        x, n = columns[(height - 1) // TILE, r, 0], columns[(height - 1) // TILE, r, 1]
        o = index_of(height - 1, x, height)
        iterate_last_dual_row(field, o, U(min(n, width - x)), schedule.dual_step)
        if x + n < width and (x + n) % STRIP == 0:
            pass_dual_on(field, o + U(n - 1), U((height + 1) * ROW + LANES))


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


@njit(forceinline=True, **OPTIONS)
def median_of_nine(field: np.ndarray, o: Index, n: Index, rows: tuple[np.ndarray, ...]) -> None:
    """Median of the 3x3 pixels around n pixels, from three rows with a pixel more on both sides, into the field.

    Sort each column; the median of nine is the median of (largest low, median middle, smallest high).
    """
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


@njit(forceinline=True, **OPTIONS)
def cubic_weights(f: Real) -> tuple[Real, Real, Real, Real]:
    """Weights of the pixels at -1, 0, 1, 2 for an offset f in [0, 1]: the cubic kernel with a = -0.75, as OpenCV's."""
    g = ONE_F - f
    w0 = CUBIC * f * g * g
    w3 = CUBIC * g * f * f
    w1 = ((CUBIC + F(2)) * f - (CUBIC + F(3))) * f * f + ONE_F
    return w0, w1, ONE_F - w0 - w1 - w3, w3


@njit(forceinline=True, **OPTIONS)
def locate_taps(field: np.ndarray, o: Index, position: Position, taps: Taps) -> None:
    """For a strip's n pixels from index o: where their flow leads, as eight weights and the top left tap of each.

    position: x and y of the first pixel, n, the padded image's pitch, and the last column and row, to which clamped.
    """
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
    weights, corners, columns = taps
    for k in range(U(out.size)):
        blend_taps(image, U(corners[k]), pitch, weights, k, columns)
    for k in range(U(out.size)):
        c = U(4) * k
        x0, x1 = weights[k], weights[k + STRIP_U]
        x2, x3 = weights[k + U(2) * STRIP_U], weights[k + U(3) * STRIP_U]
        out[k] = x0 * columns[c] + x1 * columns[c + ONE] + x2 * columns[c + U(2)] + x3 * columns[c + U(3)]


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


@njit(**OPTIONS)
def linearise(field: np.ndarray, size: Size, runs: Runs, image: np.ndarray, warped: np.ndarray) -> None:
    """Data term of the runs around the current flow (S eq. 8): rho(u') = I1(x+u) - I0 + grad . (u' - u).

    grad is the central difference of the warped image; INVERSE is 1 / |grad|^2, or 0 where the image is flat.
    """
    height, width = size
    columns, counts = runs
    pitch = image.size // (height + 3)
    row = row_buffer(width)
    for y in range(height):
        if counts[y // TILE] == 0:
            continue
        row[1 : width + 1] = warped[y]
        row[0], row[width + 1] = row[1], row[width]
        for r in range(counts[y // TILE]):
            x = columns[y // TILE, r, 0]
            end = min(x + columns[y // TILE, r, 1], width)
            start = (y + 1) * pitch + 1 + x
            above, below = warped[max(y - 1, 0), x:end], warped[min(y + 1, height - 1), x:end]
            linearise_run(field, index_of(y, x, height), (image[start : start + end - x], above, row[x:], below))


@njit(forceinline=True, **OPTIONS)
def linearise_run(field: np.ndarray, o: Index, rows: tuple[np.ndarray, ...]) -> None:
    image, above, row, below = rows
    for k in range(U(image.size)):
        i = o + k
        gx = HALF_F * (row[k + U(2)] - row[k])
        gy = HALF_F * (below[k] - above[k])
        square = gx * gx + gy * gy
        field[i + GRAD_X], field[i + GRAD_Y] = gx, gy
        field[i + RHO] = row[k + ONE] - image[k] - gx * field[i + FLOW_U] - gy * field[i + FLOW_V]
        field[i + INVERSE] = ONE_F / max(square, FLAT)


@njit(**OPTIONS)
def solve_scale(
    field: np.ndarray,
    size: Size,
    images: tuple[np.ndarray, np.ndarray],
    scratch: tuple[np.ndarray, ...],
    schedule: Schedule,
) -> None:
    """S algorithm 1 at one scale: warp, linearise, iterate, filter, with rest and drop-out of still tiles."""
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
        for iteration in range(1, schedule.num_iterations + 1):
            since = iteration - schedule.first_check
            measure = since >= 0 and since % schedule.check_every == 0
            iterate(field, size, runs, schedule, measure)
            if not measure:
                continue
            measure_change(field, size, active, change)
            if since == 0:
                keep_moving(alive, change, schedule.drop_below)
            keep_moving(active, change, schedule.freeze_below)
            if find_runs(active, runs) == 0:
                break
        if schedule.median == 3:
            active[:] = True
            find_runs(active, runs)
            filter_median(field, size, FLOW_U, runs)
            filter_median(field, size, FLOW_V, runs)


@njit(**OPTIONS)
def resample_weights(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """For each output sample of a linear resize with aligned borders: the left input sample and its right weight."""
    left, weight = np.empty(size_out, np.int32), np.empty(size_out, np.float32)
    for x in range(size_out):
        position = min(max((x + 0.5) * size_in / size_out - 0.5, 0.0), size_in - 1.0)
        left[x] = np.int32(min(position, max(size_in - 2, 0)))
        weight[x] = position - left[x]
    return left, weight


@njit(**OPTIONS)
def pad_image(image: np.ndarray, out: np.ndarray) -> None:
    """A (H, W) frame as float32 with a pixel repeated above and left, two below and right: (H+3) * (W+3), flat."""
    height, width = image.shape
    pitch = width + 3
    for y in range(height + 3):
        source = image[min(max(y - 1, 0), height - 1)]
        row = out[y * pitch : (y + 1) * pitch]
        for x in range(width):
            row[x + 1] = source[x]
        row[0], row[width + 1], row[width + 2] = row[1], row[width], row[width]


@njit(**OPTIONS)
def downscale(image: np.ndarray, size: Size, out: np.ndarray, out_size: Size) -> None:
    """The next coarser scale of a padded image, by linear interpolation."""
    height, width = size
    pitch = width + 3
    tops, weights_y = resample_weights(height, out_size[0])
    lefts, weights_x = resample_weights(width, out_size[1])
    blended = np.empty(width + 1, np.float32)
    scaled = np.empty(out_size, np.float32)
    for y in range(out_size[0]):
        start = (tops[y] + 1) * pitch + 1
        upper, lower = image[start : start + width + 1], image[start + pitch : start + pitch + width + 1]
        blend_rows(upper, lower, weights_y[y], blended)
        blend_columns(blended, lefts, weights_x, scaled[y])
    pad_image(scaled, out)


@njit(forceinline=True, **OPTIONS)
def blend_rows(upper: np.ndarray, lower: np.ndarray, weight: Real, out: np.ndarray) -> None:
    for x in range(U(out.size)):
        out[x] = upper[x] + weight * (lower[x] - upper[x])


@njit(forceinline=True, **OPTIONS)
def blend_columns(row: np.ndarray, lefts: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    for x in range(U(out.size)):
        left = U(lefts[x])
        out[x] = row[left] + weights[x] * (row[left + ONE] - row[left])


@njit(**OPTIONS)
def upsample(coarse: np.ndarray, coarse_size: Size, field: np.ndarray, size: Size) -> None:
    """Start a scale from the coarser one: u and v resized and scaled, the duals resized and 0 at their far border."""
    height, width = size
    planes = (FLOW_U, FLOW_V, DUAL_UX, DUAL_UY, DUAL_VX, DUAL_VY)
    factors = (F(width / coarse_size[1]), F(height / coarse_size[0]), ONE_F, ONE_F, ONE_F, ONE_F)
    for k in range(6):
        upsample_plane(coarse, coarse_size, field, size, planes[k], factors[k])
    clear_dual_border(field, size)


@njit(**OPTIONS)
def upsample_plane(
    coarse: np.ndarray, coarse_size: Size, field: np.ndarray, size: Size, plane: Index, factor: Real
) -> None:
    """One plane, resized and multiplied; a coarse row is resized once, on the way down."""
    height, width = size
    tops, weights_y = resample_weights(coarse_size[0], height)
    lefts, weights_x = resample_weights(coarse_size[1], width)
    source, upper, lower = row_buffer(coarse_size[1]), row_buffer(width), row_buffer(width)
    loaded = -1
    for y in range(height):
        while loaded < min(tops[y] + 1, coarse_size[0] - 1):
            loaded += 1
            upper, lower = lower, upper
            read_row(coarse, loaded, coarse_size, plane, source)
            blend_columns(source[1:], lefts, weights_x, lower[:width])
        if coarse_size[0] == 1:
            upper = lower
        for x0 in range(0, width, STRIP):
            o, end = index_of(y, x0, height) + plane, min(x0 + STRIP, width)
            place_rows(field, o, (upper[x0:end], lower[x0:end]), weights_y[y], factor)


@njit(forceinline=True, **OPTIONS)
def place_rows(field: np.ndarray, o: Index, rows: tuple[np.ndarray, ...], weight: Real, factor: Real) -> None:
    upper, lower = rows
    for x in range(U(upper.size)):
        field[o + x] = factor * (upper[x] + weight * (lower[x] - upper[x]))


@njit(**OPTIONS)
def clear_dual_border(field: np.ndarray, size: Size) -> None:
    """p_x is 0 in the last column, p_y in the last row: no flux through the frame's border (S eq. 17)."""
    height, width = size
    for y in range(height):
        o = index_of(y, width - 1, height)
        field[o + DUAL_UX], field[o + DUAL_VX] = ZERO_F, ZERO_F
    for x in range(width):
        o = index_of(height - 1, x, height)
        field[o + DUAL_UY], field[o + DUAL_VY] = ZERO_F, ZERO_F


@njit(**OPTIONS)
def read_flow(field: np.ndarray, size: Size, out: np.ndarray) -> None:
    """u and v of the field as (H, W, 2)."""
    height, width = size
    for y in range(height):
        for x0 in range(0, width, STRIP):
            o = index_of(y, x0, height)
            for x in range(min(STRIP, width - x0)):
                out[y, x0 + x, 0], out[y, x0 + x, 1] = field[o + FLOW_U + U(x)], field[o + FLOW_V + U(x)]
