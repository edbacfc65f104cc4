"""TV-L1 flow in plain NumPy, the oracle of the compiled backends: the same schedule, without any early stop."""

from __future__ import annotations

import numpy as np

from pipelines.tvl1 import TVL1Params
from pipelines.tvl1.pyramid import pyramid_sizes


def oracle_flow(first: np.ndarray, second: np.ndarray, params: TVL1Params) -> np.ndarray:
    """Flow (H, W, 2) float64 between two (H, W) uint8 frames."""
    sizes = pyramid_sizes(*first.shape, params)
    images = [(first.astype(float), second.astype(float))]
    for size in sizes[1:]:
        images.append(tuple(resize(image, size) for image in images[-1]))
    flow, dual = np.zeros((2, *sizes[-1])), np.zeros((2, 2, *sizes[-1]))
    for level in reversed(range(len(sizes))):
        h, w = sizes[level]
        if flow.shape[1:] != (h, w):
            factors = w / flow.shape[2], h / flow.shape[1]
            flow = np.stack([resize(f, (h, w)) * k for f, k in zip(flow, factors, strict=True)])
            dual = np.stack([[resize(p, (h, w)) for p in pair] for pair in dual])
            dual[:, 0, :, -1] = dual[:, 1, -1] = 0
        for _ in range(params.num_warps):
            flow, dual = solve_warp(*images[level], flow, dual, params)
    return np.moveaxis(flow, 0, -1)


def solve_warp(
    first: np.ndarray, second: np.ndarray, flow: np.ndarray, dual: np.ndarray, params: TVL1Params
) -> tuple[np.ndarray, np.ndarray]:
    """One linearisation and its iterations: flow (2, H, W), dual (2, 2, H, W) with p_x before p_y."""
    y, x = np.mgrid[: first.shape[0], : first.shape[1]]
    warped = bicubic(second, x + flow[0], y + flow[1])
    padded = np.pad(warped, 1, mode="edge")
    grad = np.stack([padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]]) / 2
    square = np.maximum((grad**2).sum(0), 1e-6)
    rho0 = warped - first - (grad * flow).sum(0)
    bound, step = params.lambda_ * params.theta, params.tau / params.theta
    for _ in range(params.num_iterations):
        t = np.clip(-(rho0 + (grad * flow).sum(0)) / square, -bound, bound)
        before = np.pad(dual, ((0, 0), (0, 0), (1, 0), (1, 0)))
        divergence = dual[:, 0] - before[:, 0, 1:, :-1] + dual[:, 1] - before[:, 1, :-1, 1:]
        flow = flow + t * grad + params.theta * divergence
        slope = np.stack([np.diff(flow, axis=2, append=flow[..., -1:]), np.diff(flow, axis=1, append=flow[:, -1:])], 1)
        dual = (dual + step * slope) / (1 + step * np.sqrt((slope**2).sum(1, keepdims=True)))
    return (np.stack([median3x3(f) for f in flow]) if params.median == 3 else flow), dual


def median3x3(image: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, 1, mode="edge"), (3, 3))
    return np.median(windows, axis=(2, 3))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Linear interpolation between pixel centres, clamped at the border."""
    for axis, n in enumerate(size):
        old = image.shape[axis]
        position = np.clip((np.arange(n) + 0.5) * old / n - 0.5, 0, old - 1)
        left = np.minimum(position.astype(int), max(old - 2, 0))
        weight = np.expand_dims(position - left, 1 - axis)
        right = np.take(image, np.minimum(left + 1, old - 1), axis)
        image = (1 - weight) * np.take(image, left, axis) + weight * right
    return image


def bicubic(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The image at (x, y) clamped to the frame, by the cubic kernel with a = -0.75."""
    h, w = image.shape
    x, y = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(image, ((1, 2), (1, 2)), mode="edge")
    taps = [cubic(np.abs(y - y0 - j + 1)) for j in range(4)], [cubic(np.abs(x - x0 - i + 1)) for i in range(4)]
    return sum(taps[0][j] * taps[1][i] * padded[y0 + j, x0 + i] for j in range(4) for i in range(4))


def cubic(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    return np.where(d <= 1, near, a * (d**3 - 5 * d**2 + 8 * d - 4))
