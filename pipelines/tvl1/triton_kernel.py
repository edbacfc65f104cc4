"""One primal-dual iteration of TV-L1 as one fused Triton kernel, for the torch backend on CUDA.

A pixel's dual step needs the new u, v of itself, its right and its lower neighbour. Programs of a GPU run in no order,
so each computes those three primal steps itself from the old state, and writes into a second buffer: six planes
written and ten read per pixel and iteration, the repeated reads served by the cache.
"""

# mypy: allow-untyped-defs
# Triton gives annotations of a kernel's arguments a meaning of its own, so the kernels below have none.

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256


def iterate_fused(
    state: torch.Tensor, data: torch.Tensor, steps: tuple[float, float, float], num_iterations: int
) -> torch.Tensor:
    """State (B, 6, H, W) after num_iterations, given the data term (B, 4, H, W); `state` is overwritten.

    steps: theta, lambda * theta, tau / theta. Planes of the state: u, v, then their duals u_x, u_y, v_x, v_y.
    """
    source, data = state.contiguous(), data.contiguous()
    target = torch.empty_like(source)
    batch, _, height, width = source.shape
    grid = (triton.cdiv(height * width, BLOCK), batch)
    for _ in range(num_iterations):
        iterate_pixels[grid](source, target, data, height, width, *steps, BLOCK=BLOCK)
        source, target = target, source
    return source


@triton.jit
def iterate_pixels(source, target, data, height, width, coupling, data_step, dual_step, BLOCK: tl.constexpr):  # noqa: N803
    """BLOCK pixels of one pair: primal step thrice, dual step once (the equations of params.py)."""
    pixels = height * width
    pair = tl.program_id(1).to(tl.int64)
    source, target, data = source + pair * 6 * pixels, target + pair * 6 * pixels, data + pair * 4 * pixels
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels
    x, y = i % width, i // width
    right, below = inside & (x + 1 < width), inside & (y + 1 < height)
    u, v = primal_step(source, data, i, x, y, inside, pixels, width, coupling, data_step)
    u_r, v_r = primal_step(source, data, i + 1, x + 1, y, right, pixels, width, coupling, data_step)
    u_b, v_b = primal_step(source, data, i + width, x, y + 1, below, pixels, width, coupling, data_step)
    tl.store(target + i, u, mask=inside)
    tl.store(target + pixels + i, v, mask=inside)
    slope_x, slope_y = tl.where(right, u_r - u, 0.0), tl.where(below, u_b - u, 0.0)
    dual_step_at(source + 2 * pixels, target + 2 * pixels, i, inside, pixels, slope_x, slope_y, dual_step)
    slope_x, slope_y = tl.where(right, v_r - v, 0.0), tl.where(below, v_b - v, 0.0)
    dual_step_at(source + 4 * pixels, target + 4 * pixels, i, inside, pixels, slope_x, slope_y, dual_step)


@triton.jit
def primal_step(source, data, i, x, y, mask, pixels, width, coupling, data_step):
    """New u and v of the pixels i at (x, y), from the old state."""
    u, v = tl.load(source + i, mask=mask, other=0.0), tl.load(source + pixels + i, mask=mask, other=0.0)
    grad_x, grad_y = tl.load(data + i, mask=mask, other=0.0), tl.load(data + pixels + i, mask=mask, other=0.0)
    rho = tl.load(data + 2 * pixels + i, mask=mask, other=0.0) + grad_x * u + grad_y * v
    t = -rho * tl.load(data + 3 * pixels + i, mask=mask, other=0.0)
    t = tl.minimum(tl.maximum(t, -data_step), data_step)
    u += t * grad_x + coupling * divergence(source + 2 * pixels, i, x, y, mask, pixels, width)
    v += t * grad_y + coupling * divergence(source + 4 * pixels, i, x, y, mask, pixels, width)
    return u, v


@triton.jit
def divergence(dual, i, x, y, mask, pixels, width):
    """Backward differences of p_x and p_y, which are 0 outside of the frame."""
    left = tl.load(dual + i - 1, mask=mask & (x > 0), other=0.0)
    above = tl.load(dual + pixels + i - width, mask=mask & (y > 0), other=0.0)
    return tl.load(dual + i, mask=mask, other=0.0) - left + tl.load(dual + pixels + i, mask=mask, other=0.0) - above


@triton.jit
def dual_step_at(old, new, i, mask, pixels, slope_x, slope_y, step):
    scale = 1.0 / (1.0 + step * tl.sqrt(slope_x * slope_x + slope_y * slope_y))
    p_x, p_y = tl.load(old + i, mask=mask, other=0.0), tl.load(old + pixels + i, mask=mask, other=0.0)
    tl.store(new + i, (p_x + step * slope_x) * scale, mask=mask)
    tl.store(new + pixels + i, (p_y + step * slope_y) * scale, mask=mask)
