"""TV-L1 on a GPU: the scales, warps and iterations of the CPU kernel, for a batch of frame pairs at once.

Every step is one Triton kernel (gpu_kernels/), so it runs wherever torch and Triton do: CUDA, ROCm and, for tests,
Triton's interpreter. There is no early stop: a launch would wait for its slowest tile, and more launches would be
needed. With the CPU kernel's early stop switched off the two agree to 0.01 px on average, with it to 0.05 px; single
pixels whose motion is ambiguous may differ by more. The flow of a pair does not depend on the batch it is solved in.
An H100 solves 4,547 pairs a second at batch 64 (docs/measurements.md).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import triton

from pipelines.errors import BackendError
from pipelines.tvl1.gpu_kernels import INTERPRETED, Machine, pitch_of
from pipelines.tvl1.gpu_kernels.iteration import LEVELS, Fields, iterate
from pipelines.tvl1.gpu_kernels.median import median3x3
from pipelines.tvl1.gpu_kernels.resampling import downscale, upsample
from pipelines.tvl1.gpu_kernels.warping import linearise
from pipelines.tvl1.params import TVL1Params
from pipelines.tvl1.pyramid import pyramid_sizes

logger = logging.getLogger(__name__)

BATCH_STEP = 8  # batches are filled up to a multiple of it, so that few graphs serve videos of all lengths
MOST_SCHEDULES = 64  # kept, each with its graph: videos have many sizes

Size = tuple[int, int]
Result = TypeVar("Result")


def iter_flow(frames: Iterator[np.ndarray], params: TVL1Params, batch_size: int) -> Iterator[np.ndarray]:
    """Flow (H, W, 2) float32 of each frame (H, W) uint8 to the next, at most batch_size pairs at a time."""
    solver = _solver_of(params)
    batch = list(islice(frames, batch_size + 1))
    while len(batch) > 1:
        stack = torch.from_numpy(np.stack(batch)).to(solver.device)
        for flow in solver.solve_in_parts(stack, batch_size, _to_numpy):
            yield from flow
        batch = [batch[-1], *islice(frames, batch_size)]


def describe_target() -> str:
    """torch, Triton, the kernels' source and the device family: what the last digits of the flow depend on."""
    device = find_device()
    versions = f"torch {torch.__version__} triton {triton.__version__} kernel-{source_hash()}"
    if device.type == "cpu":
        return f"{versions} interpreted"
    properties = torch.cuda.get_device_properties(device)
    family = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
    return f"{versions} {'rocm' if torch.version.hip else 'cuda'} {family}"


@cache
def source_hash() -> str:
    """Twelve hex digits that change with the source of the kernels and of this module."""
    digest = hashlib.sha256()
    for source in [Path(__file__), *sorted(Path(__file__).with_name("gpu_kernels").glob("*.py"))]:
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def find_device() -> torch.device:
    """The GPU of this process, or the CPU where Triton interprets its kernels; BackendError where there is neither."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    raise BackendError(
        "the torch backend of TV-L1 needs a GPU that torch sees, and here is none: take backend cpu, or look at "
        "nvidia-smi and at whether this torch is built for CUDA or ROCm"
    )


def _to_numpy(flow: torch.Tensor) -> np.ndarray:
    return flow.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@cache
def _solver_of(params: TVL1Params) -> BatchSolver:
    return BatchSolver(params)


class BatchSolver:
    """Flow between consecutive frames, a batch of pairs at once; one workspace serves all sizes. Not thread-safe.

    The launches of a solve, some 350, take the CPU as long as a small batch takes the GPU. So the second solve of a
    batch of the same size and length is recorded as a CUDA graph, and later ones replay it.
    """

    def __init__(self, params: TVL1Params, *, graphs: bool = True) -> None:
        self.params, self.device = params, find_device()
        self.graphs = graphs and self.device.type == "cuda"
        self.machine = machine_of(self.device)
        self.workspace = torch.zeros(0, device=self.device)
        self.schedules: dict[tuple[int, Size], Schedule] = {}
        self.most_pairs: dict[Size, int] = {}  # that fitted, of sizes where a larger batch did not

    def solve_in_parts(
        self, frames: torch.Tensor, most_pairs: int, finish: Callable[[torch.Tensor], Result]
    ) -> Iterator[Result]:
        """`finish` of the flow of the pairs in order, at most so many at a time, and fewer where the GPU has no room.

        Raises torch.OutOfMemoryError where not even one pair fits.
        """
        size, start = (frames.shape[1], frames.shape[2]), 0
        while start < len(frames) - 1:
            count = min(most_pairs, self.most_pairs.get(size, most_pairs), len(frames) - 1 - start)
            try:
                result = finish(self.solve(frames[start : start + count + 1]))
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                self._shrink(size, count // 2)
            else:
                start += count
                yield result

    def _shrink(self, size: Size, most_pairs: int) -> None:
        logger.warning("the GPU has no room for a batch of %dx%d: from now on %d pairs at a time", *size, most_pairs)
        self.most_pairs[size] = most_pairs
        self._forget(self.schedules)
        self.workspace = self.workspace[:0].clone()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def solve(self, frames: torch.Tensor) -> torch.Tensor:
        """Flow (B, 2, H, W) float32 of B + 1 frames (B + 1, H, W) uint8; the next solve overwrites it.

        Raises torch.OutOfMemoryError where the batch does not fit.
        """
        num_pairs = len(frames) - 1
        schedule = self._schedule(launch_size(num_pairs), (frames.shape[1], frames.shape[2]))
        schedule.frames[: len(frames)].copy_(frames)
        return schedule.run()[:num_pairs, :, :, : frames.shape[2]]

    def _schedule(self, batch: int, size: Size) -> Schedule:
        schedule = self.schedules.pop((batch, size), None) or self._make_schedule(batch, size)
        self.schedules[batch, size] = schedule  # the one used last is last
        if len(self.schedules) > MOST_SCHEDULES:
            self._forget([next(iter(self.schedules))])
        return schedule

    def _forget(self, schedules: Iterable[tuple[int, Size]]) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a graph may still be on its way
        for key in list(schedules):
            del self.schedules[key]

    def _make_schedule(self, batch: int, size: Size) -> Schedule:
        needed = floats_needed(batch, size, self.params)
        if needed > len(self.workspace):
            self._forget(self.schedules)
            self.workspace = self.workspace[:0].clone()  # freed before the larger one is asked for
            self.workspace = torch.zeros(needed, device=self.device)
        return Schedule(batch, size, self.params, self.machine, self.workspace, self.graphs)


def launch_size(num_pairs: int) -> int:
    """Pairs of the batch that so many are solved in: a power of two up to 8, then a multiple of 8."""
    return 1 << (num_pairs - 1).bit_length() if num_pairs <= BATCH_STEP else -(-num_pairs // BATCH_STEP) * BATCH_STEP


def machine_of(device: torch.device) -> Machine:
    """What launches on a device are fitted to."""
    if device.type == "cpu":
        return INTERPRETED
    return Machine(units=torch.cuda.get_device_properties(device).multi_processor_count)


def floats_needed(batch: int, size: Size, params: TVL1Params) -> int:
    """float32 numbers of the workspace of a solve."""
    finest, *coarser = (height * pitch_of(width) for height, width in pyramid_sizes(*size, params))
    frames = -(-(batch + 1) * size[0] * size[1] // 4)
    return _aligned(frames) + sum(_aligned((batch + 1) * plane) for plane in coarser) + batch * 15 * finest


def _aligned(floats: int) -> int:
    return -(-floats // 32) * 32


class Schedule:
    """The launches of one solve, on views of a workspace: `frames` (B + 1, H, W) uint8 in, flow out."""

    def __init__(
        self, batch: int, size: Size, params: TVL1Params, machine: Machine, workspace: torch.Tensor, graphs: bool
    ) -> None:
        self.batch, self.params, self.machine = batch, params, machine
        self.sizes = pyramid_sizes(*size, params)
        views = _Views(workspace)
        self.frames = views.take_bytes(batch + 1, *size)
        self.images = [self.frames, *(views.take(batch + 1, h, pitch_of(w)) for h, w in self.sizes[1:])]
        self.memory = views.rest()
        self.num_runs, self.graphs = 0, graphs
        self.graph: torch.cuda.CUDAGraph | None = None
        self.flow = self.frames.new_empty(0)

    def run(self) -> torch.Tensor:
        """The flow (B, 2, H, pitch) of the frames."""
        self.num_runs += 1
        if self.graphs and self.num_runs == 2:
            self._record()
        if self.graph:
            self.graph.replay()
        else:
            self.flow = self.launch()
        return self.flow

    def _record(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.flow = self.launch()
        except RuntimeError as error:  # flow is the same without, only the CPU has more to do
            logger.warning("the launches of TV-L1 could not be recorded as a graph: %s", error)
            self.graphs = False
        else:
            self.graph = graph

    def launch(self) -> torch.Tensor:
        """Start every kernel of the solve, coarse to fine."""
        for level in range(1, len(self.sizes)):
            larger, smaller = self.sizes[level - 1], self.sizes[level]
            downscale(self.images[level - 1], self.images[level], larger, smaller, self.machine)
        source = self._fields(self.sizes[-1])[0]
        for field in source:
            field.zero_()
        for level in reversed(range(len(self.sizes))):
            size = self.sizes[level]
            if level < len(self.sizes) - 1:
                source = self._upsample(source, level)
            source = self._solve_scale(source, self.images[level], size)
        return source[0]

    def _upsample(self, source: Fields, level: int) -> Fields:
        target = self._others(source, self.sizes[level])
        upsample(source, target, self.sizes[level + 1], self.sizes[level], self.machine)
        return target

    def _solve_scale(self, source: Fields, images: torch.Tensor, size: Size) -> Fields:
        params, data = self.params, self._data(size)
        steps = params.theta, params.lambda_ * params.theta, params.tau / params.theta
        for _ in range(params.num_warps):
            linearise(images, source[0], data, size, self.machine)
            for levels in launches_of(params.num_iterations):
                target = self._others(source, size)
                iterate(source, target, data, size, steps, levels, self.machine)
                source = target
            if params.median == 3:
                flow = self._others(source, size)[0]
                median3x3(source[0], flow, size, self.machine)
                source = flow, source[1]
        return source

    # The fields of a scale lie twice in the memory after the images, so that no kernel writes what another program of
    # it still reads; the finest scale's take all of it.

    def _fields(self, size: Size) -> tuple[Fields, Fields]:
        flow, other_flow, dual, other_dual, _ = self._parts()
        return (
            (_view(flow, self.batch, 2, size), _view(dual, self.batch, 4, size)),
            (_view(other_flow, self.batch, 2, size), _view(other_dual, self.batch, 4, size)),
        )

    def _data(self, size: Size) -> torch.Tensor:
        return _view(self._parts()[4], self.batch, 3, size)

    def _others(self, source: Fields, size: Size) -> Fields:
        """Of each field the buffer that `source` is not in."""
        first, second = self._fields(size)
        flow, dual = (b if _same(a, s) else a for a, b, s in zip(first, second, source, strict=True))
        return flow, dual

    def _parts(self) -> tuple[torch.Tensor, ...]:
        height, width = self.sizes[0]
        plane = self.batch * height * pitch_of(width)
        return self.memory[: 15 * plane].split([2 * plane, 2 * plane, 4 * plane, 4 * plane, 3 * plane])


class _Views:
    """Cuts arrays off the front of a workspace."""

    def __init__(self, workspace: torch.Tensor) -> None:
        self.workspace, self.used = workspace, 0

    def take(self, *shape: int) -> torch.Tensor:
        count = int(np.prod(shape))
        start, self.used = self.used, self.used + _aligned(count)
        return self.workspace[start : start + count].view(shape)

    def take_bytes(self, *shape: int) -> torch.Tensor:
        count = int(np.prod(shape))
        return self.take(-(-count // 4)).view(torch.uint8)[:count].view(shape)

    def rest(self) -> torch.Tensor:
        return self.workspace[self.used :]


def _view(memory: torch.Tensor, batch: int, planes: int, size: Size) -> torch.Tensor:
    height, pitch = size[0], pitch_of(size[1])
    return memory[: batch * planes * height * pitch].view(batch, planes, height, pitch)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def launches_of(num_iterations: int) -> list[int]:
    """Iterations of each launch of a warp: as many as a launch takes, then what is left."""
    full, rest = divmod(num_iterations, LEVELS)
    return [LEVELS] * full + [rest] * (rest > 0)
