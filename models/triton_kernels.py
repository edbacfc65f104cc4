"""Triton kernels for what the networks do between convolutions on CUDA: max-pools, and batch norm with ReLU.

All but the first work on channels_last_3d tensors of float32, bfloat16 or float16 and compute in float32. A program
takes a block of positions and of neighbouring channels, so that memory is read in whole lines. Nothing is summed by
atomic operations: the same input gives the same bits.

A max-pool keeps, for each output, which place of its window the maximum came from, in one byte; the gradient is
gathered: each input adds up the outputs whose byte points at it. ATen's kernel scatters instead, from int64 indices.
"""

# mypy: allow-untyped-defs
# Triton gives annotations of a kernel's arguments a meaning of its own, so the kernels below have none.
# ruff: noqa: N803

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program
MAX_CHANNELS = 64  # of these, neighbours in memory: a line of 128 bytes in bfloat16
# Products and sums are rounded apart, so that forward and backward agree on what ReLU lets pass.
EXACT = {"enable_fp_fusion": False}
# Numbers whose divisors help nothing: without a word Triton compiles a kernel again for each kind of them.
SIZES = ["T", "H", "W", "OT", "OH", "OW", "PT", "PH", "PW", "count", "steps", "parts"]
PROGRAMS = 2048  # that share the sums of batch norm's gradient: enough to keep every multiprocessor busy
# Those that share the sums of its statistics are fewer and read more at once, so that one kernel can add them up.
STATISTICS_PROGRAMS, STATISTICS_BLOCK = 512, 4096


def space_to_depth(x: Tensor, y: Tensor, stride: Sequence[int], before: Sequence[int]) -> None:
    """Blocks of `stride` elements of a clip x (B, C, T, H, W), padded by `before` in front of each axis, into y.

    y (B, D, T', H', W') channels_last_3d, rounded to its dtype: channel ((c · st + dt) · sh + dh) · sw + dw is place
    (dt, dh, dw) of channel c; what lies outside of x, and further channels, are zero. x has any strides.
    """
    depth, (height, width) = y.shape[1], y.shape[3:]
    columns = triton.next_power_of_2(depth)
    rows = BLOCK // columns
    _blocks_of_clip[(triton.cdiv(y.shape[2] * height * width, rows), len(y))](
        x, y, *x.stride(), *x.shape[2:], *y.shape[2:], *before,
        *stride, CHANNELS=x.shape[1], DEPTH=depth, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip


def pool(
    x: Tensor, y: Tensor, places: Tensor | None, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int]
) -> None:
    """Max-pool of (B, C, T, H, W) into y, padded by `before` elements in front of each axis; both channels_last_3d.

    The first maximum of a window counts, in the order of time, rows, columns, and a NaN more than any number, as in
    PyTorch. Into `places`, uint8 (B, T', H', W', C), goes where in its window each maximum was; None: nobody asks.
    """
    batch, channels, *size = y.shape
    rows, columns = _block(channels)
    _max_of_window[(triton.cdiv(math.prod(size), rows), triton.cdiv(channels, columns), batch)](
        x, y, y if places is None else places, *x.shape[2:], channels, *size, *before,
        *kernel, *stride, KEEP=places is not None, ROWS=rows, COLUMNS=columns, **EXACT,
    )  # fmt: skip


def pool_gradient(
    dy: Tensor, places: Tensor, dx: Tensor, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int]
) -> None:
    """The gradient of `pool`'s input into dx, from that of its output and the places, dx and dy channels_last_3d."""
    batch, channels, *size = dx.shape
    rows, columns = _block(channels)
    _gather_gradient[(triton.cdiv(math.prod(size), rows), triton.cdiv(channels, columns), batch)](
        dy, places, dx, *size, channels, *dy.shape[2:], *before, *kernel, *stride, ROWS=rows, COLUMNS=columns, **EXACT,
    )  # fmt: skip


def bias_relu_(x: Tensor, bias: Tensor) -> Tensor:
    """ReLU of x + bias (C,), of any of the dtypes, in place of (B, C, T, H, W) channels_last_3d."""
    count, channels = x.numel() // x.shape[1], x.shape[1]
    rows, columns = _block(channels)
    grid = (triton.cdiv(count, rows), triton.cdiv(channels, columns))
    _bias_relu[grid](x, bias, count, channels, ROWS=rows, COLUMNS=columns, **EXACT)
    return x


def norm_relu(x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """ReLU of batch norm of (B, C, T, H, W) channels_last_3d; all of its terms are (C,) float32."""
    y = torch.empty_like(x)
    count, channels = x.numel() // x.shape[1], x.shape[1]
    rows, columns = _block(channels)
    grid = (triton.cdiv(count, rows), triton.cdiv(channels, columns))
    terms = mean, variance, gamma, beta, eps
    _norm_relu[grid](x, y, *terms, count, channels, ROWS=rows, COLUMNS=columns, **EXACT)
    return y


def update_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, tracked: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of (B, C, T, H, W) channels_last_3d, float32; the running ones follow.

    `tracked`, the number of batches that the running statistics come from, is counted on.
    """
    count, channels = x.numel() // x.shape[1], x.shape[1]
    columns = _block(channels)[1]
    rows, across = STATISTICS_BLOCK // columns, triton.cdiv(channels, columns)
    blocks = triton.cdiv(count, rows)
    parts = min(triton.cdiv(STATISTICS_PROGRAMS, across), blocks)
    sums = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    _sum_moments[(parts, across)](
        x, sums, count, channels, triton.cdiv(blocks, parts), ROWS=rows, COLUMNS=columns, **EXACT
    )
    mean, variance = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    _finish_moments[(across,)](
        x, sums, mean, variance, running_mean, running_var, tracked, momentum, count, channels, parts,
        ROWS=min(64, triton.next_power_of_2(parts)), COLUMNS=columns, **EXACT,
    )  # fmt: skip
    return mean, variance


def norm_relu_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of beta, where mean and variance are those of x, and the sum that gamma's gradient is of.

    That is the gradient times x less its mean: divided by the standard deviation it is gamma's. Where ReLU let
    something pass is computed again from x, which batch norm needs anyway. dy may be some channels of a tensor of more,
    as the gradient of one of several that were concatenated is.
    """
    count, channels = x.numel() // x.shape[1], x.shape[1]
    rows, columns = _block(channels)
    blocks = triton.cdiv(count, rows), triton.cdiv(channels, columns)
    # Each part's sums are stored apart and added up afterwards: no atomic operation, one order.
    parts = min(triton.cdiv(PROGRAMS, blocks[1]), blocks[0])
    pitch = pitch_of(dy)
    if pitch is None:
        dy, pitch = dy.contiguous(memory_format=torch.channels_last_3d), channels
    terms = mean, variance, gamma, beta, eps
    shape = {"ROWS": rows, "COLUMNS": columns, **EXACT}
    sums = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    steps = triton.cdiv(blocks[0], parts)
    _sum_gradient[(parts, blocks[1])](dy, pitch, x, *terms, sums, count, channels, steps, **shape)
    sums, dx = sums.sum(dim=0), torch.empty_like(x)
    _norm_relu_gradient[blocks](dy, pitch, x, dx, *terms, sums, count, channels, **shape)
    return dx, sums[0], sums[1]


def pitch_of(x: Tensor) -> int | None:
    """Elements from one position of (B, C, T, H, W) to the next, where they lie one after another; else None."""
    _, channels, _, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last_3d):  # also where an axis of one element has any stride
        return channels
    pitch = x.stride(4)
    # As strides that one element along an axis has mean nothing, such tensors are not looked at closely.
    row, frame = width * pitch, height * width * pitch
    return pitch if x.stride() == (x.shape[2] * frame, 1, frame, row, pitch) and pitch >= channels else None


def _block(channels: int) -> tuple[int, int]:
    """Positions and channels of a program."""
    columns = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    return BLOCK // columns, columns


@triton.jit(do_not_specialize=[*SIZES, "XB", "XC", "XT", "XH", "XW"])
def _blocks_of_clip(
    x, y, XB, XC, XT, XH, XW, T, H, W, OT, OH, OW, PT, PH, PW,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(1).to(tl.int64)
    p = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, COLUMNS)[None, :]
    c, dt, dh, dw = d // (ST * SH * SW), d // (SH * SW) % ST, d // SW % SH, d % SW
    t, h, w = p // (OW * OH) * ST - PT + dt, p // OW % OH * SH - PH + dh, p % OW * SW - PW + dw
    inside = (p < OT * OH * OW) & (d < DEPTH)
    real = inside & (c < CHANNELS) & (t >= 0) & (t < T) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    value = tl.load(x + clip * XB + c * XC + t * XT + h * XH + w * XW, mask=real, other=0.0)
    tl.store(y + clip * OT * OH * OW * DEPTH + p * DEPTH + d, value, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _max_of_window(
    x, y, places, T, H, W, C, OT, OH, OW, PT, PH, PW,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(2).to(tl.int64)
    x += clip * T * H * W * C
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (p < OT * OH * OW)[:, None] & (c < C)[None, :]
    t, h, w = p // (OW * OH) * ST - PT, p // OW % OH * SH - PH, p % OW * SW - PW
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    first = (tl.maximum(-t, 0) * KH + tl.maximum(-h, 0)) * KW + tl.maximum(-w, 0)  # the first that is no padding
    place = tl.zeros((ROWS, COLUMNS), tl.int32) + first[:, None]
    for dt in range(KT):  # unrolled, the 27 places of a window would take seconds to compile
        for dh in tl.static_range(KH):
            for dw in tl.static_range(KW):
                real = (t + dt >= 0) & (t + dt < T) & (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
                at = (((t + dt) * H + h + dh) * W + w + dw) * C
                value = tl.load(x + at[:, None] + c[None, :], mask=real[:, None] & inside, other=float("-inf"))
                value = value.to(tl.float32)
                better = (value > best) | (value != value)
                best = tl.where(better, value, best)
                place = tl.where(better, (dt * KH + dh) * KW + dw, place)
    out = clip * OT * OH * OW * C + p[:, None] * C + c[None, :]
    tl.store(y + out, best, mask=inside)
    if KEEP:
        tl.store(places + out, place.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _gather_gradient(
    dy, places, dx, T, H, W, C, OT, OH, OW, PT, PH, PW,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(2).to(tl.int64)
    dy += clip * OT * OH * OW * C
    places += clip * OT * OH * OW * C
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (p < T * H * W)[:, None] & (c < C)[None, :]
    t, h, w = p // (W * H) + PT, p // W % H + PH, p % W + PW
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for it in range((KT + ST - 1) // ST):  # the windows that reach this far
        for ih in tl.static_range((KH + SH - 1) // SH):
            for iw in tl.static_range((KW + SW - 1) // SW):
                ot, oh, ow = t // ST - it, h // SH - ih, w // SW - iw
                dt, dh, dw = t - ot * ST, h - oh * SH, w - ow * SW
                real = (ot >= 0) & (ot < OT) & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
                real &= (dt < KT) & (dh < KH) & (dw < KW)
                at = (((ot * OH + oh) * OW + ow) * C)[:, None] + c[None, :]
                mask = real[:, None] & inside
                place = tl.load(places + at, mask=mask, other=255).to(tl.int32)
                # All are loaded, in whole lines: with a mask of those that count each would be an access of its own.
                gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
                total += tl.where(place == ((dt * KH + dh) * KW + dw)[:, None], gradient, 0.0)
    tl.store(dx + clip * T * H * W * C + p[:, None] * C + c[None, :], total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _bias_relu(x, bias, count, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = p[:, None] * C + c[None, :], (p < count)[:, None] & (c < C)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(x + at, tl.where(value < 0, 0.0, value), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _norm_relu(x, y, mean, variance, gamma, beta, eps, count, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = p[:, None] * C + c[None, :], (p < count)[:, None] & (c < C)[None, :]
    centre, _, scale, shift = _terms(mean, variance, gamma, beta, eps, c, C)
    value = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre) * scale + shift
    tl.store(y + at, tl.where(value < 0, 0.0, value), mask=inside)  # a NaN passes, as through ReLU


@triton.jit
def _store_sums(sums, part, c, C, first, second):
    """Two sums over the positions of a part, of a block of channels."""
    out = sums + part * 2 * C + c
    tl.store(out, tl.sum(first, axis=0), mask=c < C)
    tl.store(out + C, tl.sum(second, axis=0), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def _sum_moments(x, sums, count, C, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of what each value is above its channel's first one, and of the squares of that.

    So the squares of large means do not cancel, and parts are added up by adding.
    """
    part = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    origin = tl.load(x + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    total, squares = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        p = (part * steps + step).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (p < count)[:, None] & (c < C)[None, :]
        value = tl.load(x + p[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - origin, 0.0)
        total += value
        squares += value * value
    _store_sums(sums, part, c, C, total, squares)


@triton.jit(do_not_specialize=SIZES)
def _finish_moments(
    x, sums, mean, variance, running_mean, running_var, tracked, momentum, count, C, parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the sums of all parts the statistics of a batch, and from these the running ones."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total, squares = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts, ROWS):
        p = start + tl.arange(0, ROWS)
        at, inside = p[:, None] * 2 * C + c[None, :], (p < parts)[:, None] & (c < C)[None, :]
        total += tl.load(sums + at, mask=inside, other=0.0)
        squares += tl.load(sums + C + at, mask=inside, other=0.0)
    # A float, for an integer of above 2^24 divides as one anyway, and below it is exact.
    n = count.to(tl.float32)
    above = tl.sum(total, axis=0) / n
    spread = tl.maximum(tl.sum(squares, axis=0) / n - above * above, 0.0)
    centre = tl.load(x + c, mask=c < C, other=0.0).to(tl.float32) + above
    tl.store(mean + c, centre, mask=c < C)
    tl.store(variance + c, spread, mask=c < C)
    was = tl.load(running_mean + c, mask=c < C, other=0.0)
    tl.store(running_mean + c, was + momentum * (centre - was), mask=c < C)
    was = tl.load(running_var + c, mask=c < C, other=0.0)
    tl.store(running_var + c, was + momentum * (spread * (n / (n - 1)) - was), mask=c < C)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
def _terms(mean, variance, gamma, beta, eps, c, C):
    """Of a block of channels: mean, one by the deviation, that times gamma, and beta."""
    inverse = 1 / tl.sqrt(tl.load(variance + c, mask=c < C, other=1.0) + eps)
    scale = inverse * tl.load(gamma + c, mask=c < C, other=0.0)
    centre, shift = tl.load(mean + c, mask=c < C, other=0.0), tl.load(beta + c, mask=c < C, other=0.0)
    return centre[None, :], inverse[None, :], scale[None, :], shift[None, :]


@triton.jit
def _passed(dy, dy_at, x, at, inside, centre, scale, shift):
    """x less its mean, and the gradient of what ReLU let pass."""
    centred = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre
    gradient = tl.load(dy + dy_at, mask=inside, other=0.0).to(tl.float32)
    return centred, tl.where(centred * scale + shift > 0, gradient, 0.0)


@triton.jit(do_not_specialize=SIZES)
def _sum_gradient(
    dy, pitch, x, mean, variance, gamma, beta, eps, sums, count, C, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    centre, _, scale, shift = _terms(mean, variance, gamma, beta, eps, c, C)
    total, along = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        p = (part * steps + step).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        at, inside = p[:, None] * C + c[None, :], (p < count)[:, None] & (c < C)[None, :]
        dy_at = p[:, None] * pitch + c[None, :]
        centred, gradient = _passed(dy, dy_at, x, at, inside, centre, scale, shift)
        total += gradient
        along += gradient * centred
    _store_sums(sums, part, c, C, total, along)


@triton.jit(do_not_specialize=SIZES)
def _norm_relu_gradient(
    dy, pitch, x, dx, mean, variance, gamma, beta, eps, sums, count, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = p[:, None] * C + c[None, :], (p < count)[:, None] & (c < C)[None, :]
    centre, inverse, scale, shift = _terms(mean, variance, gamma, beta, eps, c, C)
    dy_at = p[:, None] * pitch + c[None, :]
    centred, gradient = _passed(dy, dy_at, x, at, inside, centre, scale, shift)
    total, along = tl.load(sums + c, mask=c < C, other=0.0), tl.load(sums + C + c, mask=c < C, other=0.0)
    average = (total[None, :] + centred * inverse * inverse * along[None, :]) / count
    tl.store(dx + at, (gradient - average) * scale, mask=inside)
