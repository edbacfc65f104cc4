"""Images down to the next scale, and flow with its duals up to the next: linear between pixel centres."""

# mypy: allow-untyped-defs
# Triton gives annotations of a kernel's arguments a meaning of its own, so the kernels below have none.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipelines.tvl1.gpu_kernels import OPTIONS, Machine, pitch_of

Fields = tuple[torch.Tensor, torch.Tensor]  # flow (B, 2, H, pitch), duals (B, 4, H, pitch)


def downscale(
    images: torch.Tensor, target: torch.Tensor, size: tuple[int, int], new_size: tuple[int, int], machine: Machine
) -> None:
    """Put images (N, h, row) uint8 or float32, of a scale (h, w), into `target` (N, H, row) float32, of (H, W)."""
    (height, width), (new_height, new_width) = size, new_size
    grid = (triton.cdiv(new_height * new_width, machine.pixels), len(images))
    downscale_pixels[grid](
        images, target, height, width, images.shape[2], new_height, new_width, target.shape[2],
        height / new_height, width / new_width, PIXELS=machine.pixels, **OPTIONS,
    )  # fmt: skip


def upsample(
    source: Fields, target: Fields, size: tuple[int, int], new_size: tuple[int, int], machine: Machine
) -> None:
    """Put the source's fields, of a scale (h, w), into the target's, of (H, W); flow is in pixels of its scale."""
    (height, width), (new_height, new_width) = size, new_size
    grid = (triton.cdiv(new_height * new_width, machine.pixels), len(source[0]))
    upsample_pixels[grid](
        *source, *target, height, width, pitch_of(width), new_height, new_width, pitch_of(new_width),
        height / new_height, width / new_width, PIXELS=machine.pixels, **OPTIONS,
    )  # fmt: skip


SIZES = ["height", "width", "pitch", "new_height", "new_width", "new_pitch"]


@triton.jit(do_not_specialize=SIZES)
def downscale_pixels(
    images, target, height, width, pitch, new_height, new_width, new_pitch, scale_y, scale_x, PIXELS: tl.constexpr
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    x, y = i % new_width, i // new_width
    mask = y < new_height
    corners, weights = neighbours(x, y, height, width, pitch, scale_y, scale_x)
    value = interpolate(images + image * height * pitch, corners, weights, mask)
    tl.store(target + image * new_height * new_pitch + y * new_pitch + x, value, mask)


@triton.jit(do_not_specialize=SIZES)
def upsample_pixels(
    flow, dual, flow_out, dual_out, height, width, pitch, new_height, new_width, new_pitch, scale_y, scale_x,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Flow grows with its scale; duals of a slope out of the frame are 0."""
    pair = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    x, y = i % new_width, i // new_width
    mask = y < new_height
    corners, weights = neighbours(x, y, height, width, pitch, scale_y, scale_x)
    plane, new_plane, to = height * pitch, new_height * new_pitch, y * new_pitch + x
    flow, dual = flow + pair * 2 * plane, dual + pair * 4 * plane
    flow_out, dual_out = flow_out + pair * 2 * new_plane, dual_out + pair * 4 * new_plane
    tl.store(flow_out + to, interpolate(flow, corners, weights, mask) / scale_x, mask)
    tl.store(flow_out + new_plane + to, interpolate(flow + plane, corners, weights, mask) / scale_y, mask)
    for axis in tl.static_range(2):
        inside = x < new_width - 1 if axis == 0 else y < new_height - 1
        for i in tl.static_range(2):
            at = 2 * i + axis
            value = interpolate(dual + at * plane, corners, weights, mask)
            tl.store(dual_out + at * new_plane + to, tl.where(inside, value, 0.0), mask)


@triton.jit
def neighbours(x, y, height, width, pitch, scale_y, scale_x):
    """Offsets of the four pixels around a pixel of the other scale, and how far it lies from the first."""
    x_0, x_1, weight_x = position(x, scale_x, width)
    y_0, y_1, weight_y = position(y, scale_y, height)
    corners = (y_0 * pitch + x_0, y_0 * pitch + x_1, y_1 * pitch + x_0, y_1 * pitch + x_1)
    return corners, (weight_x, weight_y)


@triton.jit
def position(index, scale, size):
    at = tl.maximum(scale * (index + 0.5) - 0.5, 0.0)
    low = tl.minimum(at.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), at - low


@triton.jit
def interpolate(image, corners, weights, mask):
    a, b = tl.load(image + corners[0], mask).to(tl.float32), tl.load(image + corners[1], mask).to(tl.float32)
    c, d = tl.load(image + corners[2], mask).to(tl.float32), tl.load(image + corners[3], mask).to(tl.float32)
    upper, lower = a + weights[0] * (b - a), c + weights[0] * (d - c)
    return upper + weights[1] * (lower - upper)
