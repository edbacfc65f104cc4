"""Between scales: images down, flow and duals up, both by linear interpolation."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipelines.tvl1.kernels.field import (
    DUAL_UX,
    DUAL_UY,
    DUAL_VX,
    DUAL_VY,
    FLOW_U,
    FLOW_V,
    ONE,
    ONE_F,
    OPTIONS,
    STRIP,
    ZERO_F,
    F,
    Index,
    Real,
    Size,
    U,
    index_of,
    read_row,
    row_buffer,
)
from pipelines.tvl1.kernels.vectors import use_widest_vectors


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
    use_widest_vectors()
    upper, lower = rows
    for x in range(U(upper.size)):
        field[o + x] = factor * (upper[x] + weight * (lower[x] - upper[x]))


@njit(**OPTIONS)
def clear_dual_border(field: np.ndarray, size: Size) -> None:
    """p_x is 0 in the last column, p_y in the last row: no flux through the frame's border."""
    height, width = size
    for y in range(height):
        o = index_of(y, width - 1, height)
        field[o + DUAL_UX], field[o + DUAL_VX] = ZERO_F, ZERO_F
    for x in range(width):
        o = index_of(height - 1, x, height)
        field[o + DUAL_UY], field[o + DUAL_VY] = ZERO_F, ZERO_F


@njit(**OPTIONS)
def resample_weights(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """For each output sample of a linear resize with aligned borders: the left input sample and its right weight."""
    left, weight = np.empty(size_out, np.int32), np.empty(size_out, np.float32)
    for x in range(size_out):
        position = min(max((x + 0.5) * size_in / size_out - 0.5, 0.0), size_in - 1.0)
        left[x] = np.int32(min(position, max(size_in - 2, 0)))
        weight[x] = position - left[x]
    return left, weight


@njit(forceinline=True, **OPTIONS)
def blend_rows(upper: np.ndarray, lower: np.ndarray, weight: Real, out: np.ndarray) -> None:
    use_widest_vectors()
    for x in range(U(out.size)):
        out[x] = upper[x] + weight * (lower[x] - upper[x])


@njit(forceinline=True, **OPTIONS)
def blend_columns(row: np.ndarray, lefts: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    use_widest_vectors()
    for x in range(U(out.size)):
        left = U(lefts[x])
        out[x] = row[left] + weights[x] * (row[left + ONE] - row[left])
