"""The worker that holds a GPU and turns batches of grey frames into codes of flow.

Several batches, of as many videos, are on their way through it at a time, each in a thread: one is uploaded and one
comes back while a third is computed. Codes leave the GPU, not floats, through page-locked memory.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines import tvl1
from pipelines.media import codec

if TYPE_CHECKING:
    import torch

    from pipelines.media.device_codec import DeviceLevels

logger = logging.getLogger(__name__)

THREADS = 4  # calls that an actor takes at a time: one uploads, one computes, one downloads, one may be a question

GreyFrames = npt.NDArray[np.uint8]  # (n + 1, H, W)


@dataclass(frozen=True)
class FlowTask:
    """What an actor computes: TV-L1 of a preset by a backend, in codes of a scale."""

    backend: str
    preset: str
    scale: codec.FlowScale


@dataclass(frozen=True)
class FlowBatch:
    """Flow of n pairs of frames.

    levels  (n, 2H, W) uint8 or uint16, codes, u over v
    counts  of each
    sample  (k, H, W, 2) float32 in px, of the first k pairs, as many as were asked for
    kernel  what computed it
    """

    levels: codec.Codes
    counts: list[codec.FlowCounts]
    sample: npt.NDArray[np.float32]
    kernel: str


class FlowActor:
    """Solves batches, from several threads at a time; dies where its GPU has failed, and Ray starts it anew."""

    def __init__(self, task: FlowTask) -> None:
        self.task = task
        self.kernel = tvl1.kernel_target(task.backend)
        self.solver = DeviceFlow(task) if task.backend == "torch" else HostFlow(task)

    def about(self) -> tuple[str, str]:
        """The kernel, and the node that the actor runs on."""
        import ray

        return self.kernel, ray.get_runtime_context().get_node_id()

    def prewarm(self) -> None:
        """Compile the kernels, or load them from this node's cache, before the first video is decoded."""
        self.solver.prewarm()

    def busy(self) -> float:
        """Seconds that flow was computed."""
        return self.solver.busy

    def solve(self, frames: GreyFrames, num_samples: int) -> FlowBatch:
        """Flow of each of the frames to the next, and the float flow of the first `num_samples` pairs."""
        try:
            levels, counts, sample = self.solver.solve(frames, num_samples)
        except Exception as error:
            if is_fatal(error):  # a GPU that has failed fails every later call of this process, too
                logger.exception("the GPU has failed; the actor starts anew")
                os._exit(1)
            raise
        return FlowBatch(levels=levels, counts=counts, sample=sample, kernel=self.kernel)


Solved = tuple[codec.Codes, list[codec.FlowCounts], npt.NDArray[np.float32]]


def is_fatal(error: Exception) -> bool:
    """An error of the GPU itself, such as an illegal address; no room is none."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


class HostFlow:
    """Flow on the CPU, for tests of what is around it."""

    def __init__(self, task: FlowTask) -> None:
        self.task, self.busy = task, 0.0

    def prewarm(self) -> None:
        tvl1.prewarm(self.task.backend)

    def solve(self, frames: GreyFrames, num_samples: int) -> Solved:
        """Codes, counts and sample of the frames' flow."""
        started = time.perf_counter()
        flow = tvl1.flow(frames, preset=self.task.preset, backend=self.task.backend)
        levels = codec.stack_components(codec.quantise(flow, self.task.scale))
        counts = [codec.count_levels(image, self.task.scale) for image in levels]
        self.busy += time.perf_counter() - started
        return levels, counts, flow[:num_samples]


class DeviceFlow:
    """Flow on the GPU of this process. A stream uploads, one computes, one downloads, whichever thread calls."""

    def __init__(self, task: FlowTask) -> None:
        from pipelines.tvl1.torch_backend import BatchSolver

        self.task, self.busy = task, 0.0
        self.solver = BatchSolver(tvl1.preset_params(task.preset))
        self.device = self.solver.device
        self.lock = threading.Lock()
        self.streams = {name: self._make_stream() for name in ("up", "compute", "down")}

    def prewarm(self) -> None:
        if self._on_gpu:
            self.solve(np.zeros((2, 64, 64), np.uint8), 0)

    def solve(self, frames: GreyFrames, num_samples: int) -> Solved:
        """Codes, counts and sample of the frames' flow; in parts where the GPU has no room for all."""
        from pipelines.media.device_codec import quantise_planes

        parts: list[tuple[DeviceLevels, torch.Tensor]] = []
        left = num_samples

        def finish(flow: torch.Tensor) -> None:
            nonlocal left
            sample = flow[:left].permute(0, 2, 3, 1).contiguous()
            parts.append((quantise_planes(flow, self.task.scale), sample))
            left -= len(sample)  # not before: where there is no room the part is solved again

        on_device = self._upload(frames)
        # The streams keep the order; the lock is held for as long as it takes to start the kernels, not to run them.
        with self.lock, self._on("compute"):
            self._wait_for("compute", "up")
            with self._timed() as elapsed:
                for _ in self.solver.solve_in_parts(on_device, len(frames) - 1, finish):
                    pass
            computed = self._mark()
        solved = self._download(parts, computed)
        with self.lock:
            self.busy += elapsed()
        return solved

    def _upload(self, frames: GreyFrames) -> torch.Tensor:
        import torch

        with self._on("up"):
            # Page-locked: from other memory non_blocking has no effect, and the thread would wait.
            pinned = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=self._on_gpu)
            pinned.numpy()[...] = frames
            return pinned.to(self.device, non_blocking=True)

    def _download(self, parts: list[tuple[DeviceLevels, torch.Tensor]], computed: Any) -> Solved:
        with self._on("down"):
            if computed:
                # This batch's own event: the stream that computes may have the next one already.
                self.streams["down"].wait_event(computed)
            host = [
                [self._to_host(x) for x in (coded.codes, coded.lengths, coded.clipped, coded.finite, sample)]
                for coded, sample in parts
            ]
            if self._on_gpu:
                # NumPy reads the memory without asking whether it has come.
                self.streams["down"].synchronize()
        codes, lengths, clipped, finite, samples = (np.concatenate(arrays) for arrays in zip(*host, strict=True))
        return self._read(codes, lengths, clipped, finite), self._count(lengths, clipped), samples

    def _read(self, codes: np.ndarray, lengths: np.ndarray, clipped: np.ndarray, finite: np.ndarray) -> codec.Codes:
        # Looked at here: on the device it would have made every batch wait for its answer.
        if not finite.all():
            raise ValueError("flow holds NaN or infinity; look at the kernel that made it")
        # torch computes little with uint16, so the device has it as int16.
        return codes.view(self.task.scale.dtype)

    @staticmethod
    def _count(lengths: np.ndarray, clipped: np.ndarray) -> list[codec.FlowCounts]:
        from pipelines.media.device_codec import FIXED_POINT

        pairs = zip(lengths.tolist(), clipped.tolist(), strict=True)
        return [codec.FlowCounts(length=length / FIXED_POINT, clipped=count) for length, count in pairs]

    def _to_host(self, values: torch.Tensor) -> np.ndarray:
        import torch

        values = values.reshape(1) if values.ndim == 0 else values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._on_gpu)
        return host.copy_(values, non_blocking=True).numpy()

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _make_stream(self) -> Any:
        import torch

        return torch.cuda.Stream(self.device) if self._on_gpu else None

    def _on(self, name: str) -> AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(self.streams[name]) if self._on_gpu else nullcontext()

    def _wait_for(self, waiting: str, earlier: str) -> None:
        if self._on_gpu:
            self.streams[waiting].wait_stream(self.streams[earlier])

    def _mark(self) -> Any:
        import torch

        return torch.cuda.current_stream().record_event(torch.cuda.Event()) if self._on_gpu else None

    @contextmanager
    def _timed(self) -> Iterator[Any]:
        """Gives a function that says how many seconds the inner part took the device; ask once it is done."""
        import torch

        if not self._on_gpu:
            started = time.perf_counter()
            took: list[float] = []
            yield lambda: took[0]
            took.append(time.perf_counter() - started)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield lambda: start.elapsed_time(end) / 1000
        end.record()
