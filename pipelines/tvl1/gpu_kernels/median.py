"""The 3x3 median of the flow as a sorting network: nine loads, which the cache serves, and no memory beside."""

# mypy: allow-untyped-defs
# Triton gives annotations of a kernel's arguments a meaning of its own, so the kernels below have none.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipelines.tvl1.gpu_kernels import OPTIONS, Machine, pitch_of


def median3x3(flow: torch.Tensor, target: torch.Tensor, size: tuple[int, int], machine: Machine) -> None:
    """Put the 3x3 median of u and of v, edges repeated, into `target`; both (B, 2, H, pitch)."""
    height, width = size
    grid = (triton.cdiv(height * width, machine.pixels), 2 * len(flow))
    median_pixels[grid](flow, target, height, width, pitch_of(width), PIXELS=machine.pixels, **OPTIONS)


@triton.jit(do_not_specialize=["height", "width"])
def median_pixels(source, target, height, width, pitch, PIXELS: tl.constexpr):
    """PIXELS pixels of one plane: each column of three sorted, then the median of what can still be it."""
    plane = tl.program_id(1).to(tl.int64) * height * pitch
    i = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    x, y = i % width, i // width
    mask = y < height
    above, row, below = tl.maximum(y - 1, 0) * pitch, y * pitch, tl.minimum(y + 1, height - 1) * pitch
    left, right = tl.maximum(x - 1, 0), tl.minimum(x + 1, width - 1)
    source += plane
    low_l, mid_l, high_l = sorted_column(source, above + left, row + left, below + left, mask)
    low, mid, high = sorted_column(source, above + x, row + x, below + x, mask)
    low_r, mid_r, high_r = sorted_column(source, above + right, row + right, below + right, mask)
    low = tl.maximum(tl.maximum(low_l, low), low_r)
    high = tl.minimum(tl.minimum(high_l, high), high_r)
    tl.store(target + plane + row + x, median_of(low, median_of(mid_l, mid, mid_r), high), mask)


@triton.jit
def sorted_column(source, above, at, below, mask):
    a, b, c = tl.load(source + above, mask), tl.load(source + at, mask), tl.load(source + below, mask)
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    return tl.minimum(low, c), tl.maximum(low, tl.minimum(high, c)), tl.maximum(high, c)


@triton.jit
def median_of(a, b, c):
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
