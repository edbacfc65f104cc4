"""Primal-dual iterations of TV-L1, several to a launch, without shared memory and without barriers.

A warp of 32 threads walks down a strip of 64 columns, two columns to a thread, and a row enters LEVELS iterations at
once: iteration k works one row above iteration k - 1, in which everything it needs is done. So the rows in between,
one to an iteration, stay in registers; the neighbours above and below are the thread's own registers, those to the
left and right its other column or one shuffle within the warp. Per pixel and iteration that leaves a fifth of the
memory traffic of one iteration a launch.

What a strip cannot know, as it does not see its neighbours' work, spreads by one pixel an iteration from its left,
right and upper edge, and so do the rows that it ends with: strips overlap by that much and store the rest. The
columns of the overlap are an even number, for a thread's two columns to be loaded and stored as one.
"""

# mypy: allow-untyped-defs
# Triton gives annotations of a kernel's arguments a meaning of its own, so the kernels below have none.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pipelines.tvl1.gpu_kernels import OPTIONS, Machine, pitch_of

LEVELS = 5  # iterations a launch: what fits the registers, and what the iterations of all presets are multiples of
STRIP = 64  # columns a strip
WARPS_PER_UNIT = 12  # that fit the registers of a streaming multiprocessor: 168 a thread on sm_90

Steps = tuple[float, float, float]  # theta, lambda * theta, tau / theta
Fields = tuple[torch.Tensor, torch.Tensor]  # flow (B, 2, H, pitch), duals (B, 4, H, pitch)


@dataclass(frozen=True)
class Grid:
    """How a frame is cut into strips, and the strips into segments of rows."""

    columns: int
    segments: int
    rows: int  # of a segment, that it stores


def cut(size: tuple[int, int], batch: int, levels: int, units: int) -> Grid:
    """The cut for the shortest time on `units` multiprocessors: short walks fill them, long ones overlap less."""
    height, width = size
    overlap = _overlap(levels)
    columns = 1 if width <= STRIP else -(-(width - 2 * overlap) // (STRIP - 2 * overlap))
    at_once = units * WARPS_PER_UNIT

    def cost(segments: int) -> int:
        strips, steps = batch * columns * segments, -(-height // segments) + 2 * levels
        room = -(-strips // at_once) * at_once  # a last wave that is not full ends a little earlier than a full one
        return (room + strips) * steps

    segments = min(range(1, -(-height // 8) + 1), key=cost)
    rows = -(-height // segments)
    return Grid(columns=columns, segments=-(-height // rows), rows=rows)


def iterate(
    source: Fields,
    target: Fields,
    data: torch.Tensor,
    size: tuple[int, int],
    steps: Steps,
    levels: int,
    machine: Machine,
) -> None:
    """`levels` iterations from the source's fields to the target's, given the data term (B, 3, H, pitch)."""
    (height, width), batch = size, len(data)
    grid = cut(size, batch, levels, machine.units)
    num_strips = batch * grid.columns * grid.segments
    iterate_strips[(triton.cdiv(num_strips, machine.strips),)](
        *source, *target, data, height, width, pitch_of(width), grid.columns, grid.segments, grid.rows, num_strips,
        *steps, LEVELS=levels, OVERLAP=_overlap(levels), STRIP=STRIP, STRIPS=machine.strips,
        num_warps=machine.strips, **OPTIONS,
    )  # fmt: skip


def _overlap(levels: int) -> int:
    return levels + levels % 2


# One compilation for all sizes.
@triton.jit(do_not_specialize=["height", "width", "columns", "segments", "rows", "num_strips"])
def iterate_strips(
    flow, dual, flow_out, dual_out, data, height, width, pitch, columns, segments, rows, num_strips,
    theta, data_step, dual_step,
    LEVELS: tl.constexpr, OVERLAP: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """STRIPS segments of strips, one to a warp: each walks down its rows and LEVELS further ones at either end."""
    LANES: tl.constexpr = STRIP // 2
    strip = tl.program_id(0) * STRIPS + tl.arange(0, STRIPS)[:, None]
    column, segment = strip % columns, (strip // columns) % segments
    pair = tl.where(strip < num_strips, strip // (columns * segments), 0).to(tl.int64)[:, :, None]
    lane = tl.arange(0, LANES)[None, :]
    x = column * (STRIP - 2 * OVERLAP) + 2 * lane
    first = segment * rows
    last = tl.where(strip < num_strips, tl.minimum(first + rows, height), 0)
    row = first - tl.minimum(first, LEVELS)
    # Two columns to a thread, as the last axis.
    at = x[:, :, None] + tl.arange(0, 2)[None, None, :]
    readable = (x < width)[:, :, None]
    stored = ((lane >= tl.where(column == 0, 0, OVERLAP // 2)) & (x < width))[:, :, None]
    stored &= (lane < tl.where(column == columns - 1, LANES, LANES - OVERLAP // 2))[:, :, None]
    everywhere = tl.zeros([STRIPS, LANES], tl.int32)
    lanes = (tl.maximum(lane - 1, 0) + everywhere, tl.minimum(lane + 1, LANES - 1) + everywhere)
    edges = (lane > 0, x + 1 < width, x + 2 < width)  # a strip's first column lies at the frame's edge or is overlap
    plane = height * pitch
    flow, dual, data = flow + pair * 2 * plane, dual + pair * 4 * plane, data + pair * 3 * plane
    flow_out, dual_out = flow_out + pair * 2 * plane, dual_out + pair * 4 * plane
    nothing = tl.zeros([STRIPS, LANES], tl.float32)
    held = (((nothing,) * 10, (nothing,) * 10),) * LEVELS
    there = readable & (row < height)[:, :, None]
    loaded = load_row(flow, dual, data, (row * pitch)[:, :, None] + at, there, plane)
    for _ in range(rows + 2 * LEVELS):
        passing = loaded
        there = readable & (row + 1 < height)[:, :, None]  # the next row is on its way while this one is computed
        loaded = load_row(flow, dual, data, ((row + 1) * pitch)[:, :, None] + at, there, plane)
        kept = ()
        for level in tl.static_range(LEVELS):
            between = (row - level > 0) & (row - level < height)
            passing, entered = step_down(passing, held[level], lanes, edges, between, theta, data_step, dual_step)
            kept = kept + (entered,)  # type: ignore[assignment]
        held = kept
        done = row - LEVELS
        mask = stored & ((done >= first) & (done < last))[:, :, None]
        to = (done * pitch)[:, :, None] + at
        for i in tl.static_range(2):
            tl.store(flow_out + i * plane + to, tl.join(passing[0][i], passing[1][i]), mask)
        for i in tl.static_range(4):
            tl.store(dual_out + i * plane + to, tl.join(passing[0][2 + i], passing[1][2 + i]), mask)
        row += 1


@triton.jit
def load_row(flow, dual, data, at, mask, plane):
    """u, v, four duals, grad x, grad y, rho, 1 / |grad|^2 of a row, of the even and of the odd columns."""
    u_e, u_o = tl.split(tl.load(flow + at, mask, 0.0))
    v_e, v_o = tl.split(tl.load(flow + plane + at, mask, 0.0))
    ux_e, ux_o = tl.split(tl.load(dual + at, mask, 0.0))
    uy_e, uy_o = tl.split(tl.load(dual + plane + at, mask, 0.0))
    vx_e, vx_o = tl.split(tl.load(dual + 2 * plane + at, mask, 0.0))
    vy_e, vy_o = tl.split(tl.load(dual + 3 * plane + at, mask, 0.0))
    gx_e, gx_o = tl.split(tl.load(data + at, mask, 0.0))
    gy_e, gy_o = tl.split(tl.load(data + plane + at, mask, 0.0))
    rho_e, rho_o = tl.split(tl.load(data + 2 * plane + at, mask, 0.0))
    even = (u_e, v_e, ux_e, uy_e, vx_e, vy_e, gx_e, gy_e, rho_e, inverse_square(gx_e, gy_e))
    return even, (u_o, v_o, ux_o, uy_o, vx_o, vy_o, gx_o, gy_o, rho_o, inverse_square(gx_o, gy_o))


@triton.jit
def inverse_square(grad_x, grad_y):
    square = tl.maximum(grad_x * grad_x + grad_y * grad_y, 1e-6)  # below, a pixel says nothing about its motion
    return reciprocal(square)


@triton.jit
def reciprocal(x):
    """1 / x of a positive x whose square is a float: one instruction on a GPU, where a division takes eight."""
    return tl.rsqrt(x * x)


@triton.jit
def step_down(entering, held, lanes, edges, between, theta, data_step, dual_step):
    """One iteration: primal step of the row that enters, then dual step of the row above, which is held.

    Returns the row above, done, and the row that entered with its new flow. between: the two rows lie in the frame.
    """
    even, odd = entering
    above_e, above_o = held
    dual_e, dual_o = even[2:6], odd[2:6]
    left = (shift(odd[2], lanes[0], edges[0]), odd[3], shift(odd[4], lanes[0], edges[0]), odd[5])
    flow_e = primal_step(even, left, above_e, theta, data_step)
    flow_o = primal_step(odd, dual_e, above_o, theta, data_step)
    right = (tl.gather(above_e[0], lanes[1], 1), tl.gather(above_e[1], lanes[1], 1))
    new_e = dual_step_at(above_e, above_o, flow_e, edges[1], between, dual_step)
    new_o = dual_step_at(above_o, right, flow_o, edges[2], between, dual_step)
    done = (above_e[0:2] + new_e + above_e[6:10], above_o[0:2] + new_o + above_o[6:10])
    return done, (flow_e + dual_e + even[6:10], flow_o + dual_o + odd[6:10])


@triton.jit
def shift(values, lanes, inside):
    return tl.where(inside, tl.gather(values, lanes, 1), 0.0)


@triton.jit
def primal_step(pixel, left, above, theta, data_step):
    """New u and v (the primal equation of params.py), given the duals to the left and the pixel above."""
    u, v, ux, uy, vx, vy, grad_x, grad_y, rho, inverse = pixel
    t = -(rho + grad_x * u + grad_y * v) * inverse
    t = tl.minimum(tl.maximum(t, -data_step), data_step)
    u += t * grad_x + theta * ((ux - left[0]) + (uy - above[3]))
    v += t * grad_y + theta * ((vx - left[2]) + (vy - above[5]))
    return u, v


@triton.jit
def dual_step_at(pixel, right, below, inside, between, step):
    """New duals (the dual equation of params.py), given the flow to the right and below.

    Slopes out of the frame are 0.
    """
    u, v = pixel[0], pixel[1]
    slope_ux, slope_vx = tl.where(inside, right[0] - u, 0.0), tl.where(inside, right[1] - v, 0.0)
    slope_uy, slope_vy = tl.where(between, below[0] - u, 0.0), tl.where(between, below[1] - v, 0.0)
    scale_u = reciprocal(1.0 + step * tl.sqrt(slope_ux * slope_ux + slope_uy * slope_uy))
    scale_v = reciprocal(1.0 + step * tl.sqrt(slope_vx * slope_vx + slope_vy * slope_vy))
    ux, uy = (pixel[2] + step * slope_ux) * scale_u, (pixel[3] + step * slope_uy) * scale_u
    vx, vy = (pixel[4] + step * slope_vx) * scale_v, (pixel[5] + step * slope_vy) * scale_v
    return ux, uy, vx, vy
