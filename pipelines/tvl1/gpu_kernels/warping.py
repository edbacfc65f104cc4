"""The data term of TV-L1 around the present flow: the second image warped, its gradients, and rho, in one pass.

A warp of 32 threads walks down a strip of 32 columns and warps one row a step, a pixel to a thread. The gradients of a
row need the warped rows above and below, which are in registers, and the columns to the left and right, which are one
shuffle away: no pixel is warped again but at the strips' edges, and the warped image is never stored.
"""

# mypy: allow-untyped-defs
# Triton gives annotations of a kernel's arguments a meaning of its own, so the kernels below have none.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipelines.tvl1.gpu_kernels import OPTIONS, Machine, pitch_of

FEWEST_ROWS = 8
WARPS_PER_UNIT = 16  # that keep a multiprocessor busy
LANES = 32  # columns of a strip; the first and the last are only there for the others' gradients


def linearise(
    images: torch.Tensor, flow: torch.Tensor, data: torch.Tensor, size: tuple[int, int], machine: Machine
) -> None:
    """Put grad x, grad y and rho at flow 0 into `data` (B, 3, H, pitch), given the flow (B, 2, H, pitch).

    images: B + 1 consecutive frames, (B + 1, H, row) uint8 or float32, of any row length; pair i is frames i and i + 1.
    """
    height, width = size
    columns = triton.cdiv(width, LANES - 2)
    rows = rows_of(height, len(data) * columns, machine)
    segments = triton.cdiv(height, rows)
    num_strips = len(data) * columns * segments
    linearise_strips[(triton.cdiv(num_strips, machine.strips),)](
        images, flow, data, height, width, images.shape[2], pitch_of(width), columns, segments, rows, num_strips,
        LANES=LANES, STRIPS=machine.strips, num_warps=machine.strips, **OPTIONS,
    )  # fmt: skip


def rows_of(height: int, num_strips: int, machine: Machine) -> int:
    """Rows of a segment: as the machine has them, or fewer where there would be too few warps to fill it."""
    rows = machine.rows
    while rows > FEWEST_ROWS and num_strips * triton.cdiv(height, rows) < machine.units * WARPS_PER_UNIT:
        rows //= 2
    return min(rows, height)


@triton.jit(do_not_specialize=["height", "width", "image_pitch", "columns", "segments", "rows", "num_strips"])
def linearise_strips(
    images, flow, data, height, width, image_pitch, pitch, columns, segments, rows, num_strips,
    LANES: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """STRIPS segments of strips, one to a warp; pixels outside of the frame are those of its edge."""
    strip = tl.program_id(0) * STRIPS + tl.arange(0, STRIPS)[:, None]
    column, segment = strip % columns, (strip // columns) % segments
    pair = tl.where(strip < num_strips, strip // (columns * segments), 0).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    inner = column * (LANES - 2) + lane - 1
    x = tl.minimum(tl.maximum(inner, 0), width - 1)
    stored = (strip < num_strips) & (lane > 0) & (lane < LANES - 1) & (inner < width)
    lanes = tl.zeros([STRIPS, LANES], tl.int32) + lane
    to_left, to_right = tl.maximum(lanes - 1, 0), tl.minimum(lanes + 1, LANES - 1)
    plane, image = height * pitch, height * image_pitch
    flow, data = flow + pair * 2 * plane, data + pair * 3 * plane
    first, second = images + pair * image, images + (pair + 1) * image
    # Two tensors, not one: where `above = middle` below would put back the very tensor that `above` began with, Triton
    # (3.6 to 3.9) takes `above` for one that the loop does not change. Its interpreter does not.
    above, middle = tl.zeros([STRIPS, LANES], tl.float32), tl.zeros([STRIPS, LANES], tl.float32)
    u_middle, v_middle = middle, middle
    for step in range(rows + 2):
        row = segment * rows + step - 1
        y = tl.minimum(tl.maximum(row, 0), height - 1)
        u, v = tl.load(flow + y * pitch + x), tl.load(flow + plane + y * pitch + x)
        below = bicubic(second, x + u, y + v, height, width, image_pitch)
        grad_x = 0.5 * (tl.gather(middle, to_right, 1) - tl.gather(middle, to_left, 1))
        grad_y = 0.5 * (below - above)
        to = (row - 1) * pitch + x
        mask = stored & (step > 1) & (row - 1 < height)
        was = tl.load(first + (row - 1) * image_pitch + x, mask, 0).to(tl.float32)
        tl.store(data + to, grad_x, mask)
        tl.store(data + plane + to, grad_y, mask)
        tl.store(data + 2 * plane + to, middle - was - grad_x * u_middle - grad_y * v_middle, mask)
        above, middle, u_middle, v_middle = middle, below, u, v


@triton.jit
def bicubic(image, x, y, height, width, pitch):
    """The image at (x, y) clamped to the frame, by the cubic kernel with a = -0.75 over four by four pixels."""
    x, y = tl.minimum(tl.maximum(x, 0.0), width - 1.0), tl.minimum(tl.maximum(y, 0.0), height - 1.0)
    x_0, y_0 = tl.floor(x), tl.floor(y)
    weights_x, weights_y = cubic_weights(x - x_0), cubic_weights(y - y_0)
    column, row = x_0.to(tl.int32), y_0.to(tl.int32)
    value = tl.zeros_like(x)
    for j in tl.static_range(4):
        line = image + tl.minimum(tl.maximum(row + (j - 1), 0), height - 1) * pitch
        part = tl.zeros_like(x)
        for i in tl.static_range(4):
            part += weights_x[i] * tl.load(line + tl.minimum(tl.maximum(column + (i - 1), 0), width - 1)).to(tl.float32)
        value += weights_y[j] * part
    return value


@triton.jit
def cubic_weights(t):
    """Weights of the pixels at -1, 0, 1 and 2 for a point at t in [0, 1) (Keys, 1981, with a = -0.75)."""
    s = 1.0 - t
    return -0.75 * t * s * s, (1.25 * t - 2.25) * t * t + 1.0, (1.25 * s - 2.25) * s * s + 1.0, -0.75 * s * t * t
