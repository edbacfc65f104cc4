"""TV-L1 on one CPU core: pyramids, a compiled solver per scale, and one workspace per video."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numba
import numpy as np
from numba.core.registry import cpu_target

from pipelines.tvl1.kernel_cache import compile_on_this_node, is_compiled_on_this_node, load_kernels, source_hash
from pipelines.tvl1.params import TVL1Params
from pipelines.tvl1.pyramid import pyramid_sizes

if TYPE_CHECKING:
    from pipelines.tvl1 import kernels
else:
    kernels = load_kernels()


class Solver:
    """Flow between consecutive frames of one size (H, W); holds the pyramids of two frames and the fields."""

    def __init__(self, height: int, width: int, params: TVL1Params) -> None:
        self.sizes = pyramid_sizes(height, width, params)
        self.schedule = _schedule(params)
        self.frame = np.empty((height, width), np.uint8)
        self.pyramids = [[np.zeros((h + 3) * (w + 3), np.float32) for h, w in self.sizes] for _ in range(2)]
        self.fields = [_aligned_zeros(kernels.field_size(*size)) for size in self.sizes[:2]]
        self.scratch = [_scratch(h, w) for h, w in self.sizes]

    def load(self, frame: np.ndarray) -> None:
        """Make `frame` (H, W) uint8 the second of the pair, and the second before it the first."""
        self.pyramids.reverse()
        levels = self.pyramids[1]
        self.frame[:] = frame  # one memory layout for the compiled code, whatever the caller's
        kernels.pad_image(self.frame, levels[0])
        for level in range(1, len(levels)):
            kernels.downscale(levels[level - 1], self.sizes[level - 1], levels[level], self.sizes[level])

    def solve(self) -> np.ndarray:
        """Flow (H, W, 2) float32 from the first loaded frame to the second, coarse to fine."""
        coarsest = len(self.sizes) - 1
        self.fields[coarsest % 2][: kernels.field_size(*self.sizes[coarsest])] = 0
        for level in range(coarsest, -1, -1):
            size, field = self.sizes[level], self.fields[level % 2]
            if level < coarsest:
                kernels.upsample(self.fields[(level + 1) % 2], self.sizes[level + 1], field, size)
            images = self.pyramids[0][level], self.pyramids[1][level]
            kernels.solve_scale(field, size, images, self.scratch[level], self.schedule)
        flow = np.empty((*self.sizes[0], 2), np.float32)
        kernels.read_flow(self.fields[0], self.sizes[0], flow)
        return flow


def iter_flow(frames: Iterator[np.ndarray], params: TVL1Params) -> Iterator[np.ndarray]:
    """Flow (H, W, 2) float32 of each frame (H, W) uint8 to the next, on the calling thread, without the GIL."""
    compile_once()
    solver = None
    for frame in frames:
        if solver is None:
            solver = Solver(frame.shape[0], frame.shape[1], params)
            solver.load(frame)
            continue
        solver.load(frame)
        yield solver.solve()


@cache
def compile_once() -> None:
    """Load the kernels' machine code; where this node has none yet, a child process compiles it first, in about 12 s.

    Never this process: what numba has just compiled and what it loads from its files differ in the order of float
    operations, and the flow must not depend on which worker came first.
    """
    compile_on_this_node(describe_target(), f"from {__name__} import solve_still; solve_still()")
    solve_still()


def is_compiled() -> bool:
    """Whether this node has the kernels' machine code."""
    return is_compiled_on_this_node(describe_target())


def solve_still() -> None:
    """Call every kernel once."""
    solver = Solver(32, 32, TVL1Params())
    solver.load(np.zeros((32, 32), np.uint8))
    solver.solve()


def describe_target() -> str:
    """numba, processor family, vector width and kernel source: what the last digits of the flow depend on."""
    _, family, features = cpu_target.target_context.codegen().magic_tuple()
    width = next((name for name in ("avx512f", "avx2", "neon") if f"+{name}" in features), "baseline")
    if kernels.prefers_512(family, features.split(",")):
        width += "-512"
    return f"cpu numba-{numba.__version__} {family} {width} kernel-{source_hash()}"


def _schedule(params: TVL1Params) -> kernels.Schedule:
    return kernels.Schedule(
        coupling=np.float32(params.theta),
        data_step=np.float32(params.lambda_ * params.theta),
        dual_step=np.float32(params.tau / params.theta),
        num_warps=params.num_warps,
        num_iterations=params.num_iterations,
        median=params.median,
        first_check=params.first_check
        if params.freeze_below > 0 or params.drop_below > 0
        else params.num_iterations + 1,
        check_every=params.check_every,
        freeze_below=np.float32(params.freeze_below**2),
        drop_below=np.float32(params.drop_below**2),
    )


def _scratch(height: int, width: int) -> tuple[np.ndarray, ...]:
    bands, tiles = -(-height // kernels.TILE), -(-width // kernels.TILE)
    return (
        np.empty((height, width), np.float32),
        np.empty((bands, tiles), np.bool_),
        np.empty((bands, tiles), np.bool_),
        np.zeros((bands, tiles), np.float32),
        np.empty((bands, tiles, 2), np.int64),
        np.empty(bands, np.int64),
    )


def _aligned_zeros(size: int) -> np.ndarray:
    """Zeros that start on a cache line, where 16-wide loads do not straddle two."""
    raw = np.zeros(size + kernels.LANES, np.float32)
    start = -(raw.ctypes.data // raw.itemsize) % kernels.LANES
    return raw[start : start + size]
