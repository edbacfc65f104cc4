"""Everything that decides about the bytes of features, and how a worker makes those of one video from its frames."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import llvmlite.binding
import numpy as np
import numpy.typing as npt
import torch

from models import cuda
from models.input_spec import Stream
from pipelines import tvl1
from pipelines.errors import RunError, VideoError
from pipelines.extraction.plan import LIMITS
from pipelines.features.compute import FeatureNetworks
from pipelines.features.settings import FeatureSettings
from pipelines.features.spool import Features, Spool
from pipelines.media import codec
from pipelines.media.codec import FlowScale
from pipelines.media.decode import DecodeSettings
from pipelines.records import Values
from pipelines.training.weights_files import Which
from pipelines.tvl1.params import FlowPreset

if TYPE_CHECKING:
    from pipelines.extraction.metrics import Stopwatch  # which imports ray; jobs must not, before they connect

Frame: TypeAlias = npt.NDArray[Any]
SolveFlow: TypeAlias = Callable[[Iterable[npt.NDArray[np.uint8]]], Iterator[codec.Codes]]


@dataclass(frozen=True, kw_only=True)
class FeatureTask:
    """What a worker must know to make the features of a video; hashable, and it travels to workers.

    settings  with its streams named
    decode    of videos; of a data set's shards nothing is decoded by it
    scale     of the codes in which flow is computed, or stored in the data set's shards
    networks  stream, absolute URI and hash of the weights of each
    data      data set to read instead of videos, and its fingerprint; None: videos
    """

    settings: FeatureSettings
    decode: DecodeSettings
    flow_preset: FlowPreset
    scale: FlowScale
    networks: tuple[tuple[Stream, str, str], ...]
    which: Which = "last"
    precision: str = "fp32"
    data: tuple[str, str] | None = None

    @property
    def streams(self) -> tuple[Stream, ...]:
        """RGB before flow."""
        return tuple(stream for stream, _, _ in self.networks)

    @property
    def scales(self) -> dict[Stream, FlowScale | None]:
        """What `FeatureNetworks.open` wants of each stream."""
        return {stream: self.scale if stream == "flow" else None for stream in self.streams}

    @property
    def computes_flow(self) -> bool:
        """Whether flow is computed here, and not read."""
        return "flow" in self.streams and self.data is None

    def load(self, device: torch.device) -> FeatureNetworks:
        """The networks of a worker. Raises RunError where they are not those that were planned."""
        uris = {stream: uri for stream, uri, _ in self.networks}
        try:
            found = FeatureNetworks.load(uris, self.settings, which=self.which, precision=self.precision, device=device)
        except cuda.ConvolutionError as error:
            raise RunError(str(error)) from error
        for stream, uri, sha256 in self.networks:
            if found.hashes[stream] != sha256:
                raise RunError(
                    f"--{stream} {uri} has other weights than when this run was planned: run the same command again, "
                    "with another --output if these are the ones you want"
                )
        return found


@lru_cache(maxsize=1)
def keep_networks(task: FeatureTask, device: torch.device) -> FeatureNetworks:
    """The networks of this process, which the next video finds loaded."""
    torch.set_num_threads(1)  # a task reserves one CPU; torch would take them all
    return task.load(device)


def find_kernel(backend: str, *, computes_flow: bool) -> str:
    """What the last digits of features depend on: flow's kernel where there is flow to compute, else the processor.

    Begins with the backend's name, as flow's kernels do.
    """
    if computes_flow or backend != "cpu":
        return tvl1.kernel_target(backend)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu torch-{torch.__version__} {platform.machine()} {llvmlite.binding.get_host_cpu_name()} {capability}"


def load_flow_kernel(backend: str) -> str:
    """Load the flow kernel on a node, and name it."""
    tvl1.prewarm(backend)
    return find_kernel(backend, computes_flow=True)


def load_no_kernel(backend: str) -> str:
    """Name the processor of a node on which no flow will be computed."""
    return find_kernel(backend, computes_flow=False)


class VideoFeatures:
    """One video on its way through the networks: frames go in one by one, features come out as windows are complete."""

    def __init__(self, networks: FeatureNetworks, scales: dict[Stream, FlowScale | None]) -> None:
        self.streams = {stream: networks.open(stream, scale) for stream, scale in scales.items()}

    def push(self, stream: Stream, frame: Frame) -> None:
        """The next frame of a stream: RGB (H, W, 3), or codes of flow (2H, W)."""
        with at_features():
            self.streams[stream].push(frame)

    def take(self) -> Features:
        """What came since the last time, of each stream (windows, [crops,] channels)."""
        return {stream: features.take() for stream, features in self.streams.items()}

    def finish(self) -> Features:
        """What was not taken. Raises VideoError where the video has no window."""
        with at_features():
            return {stream: features.finish() for stream, features in self.streams.items()}


@contextmanager
def at_features() -> Iterator[None]:
    """What a video is refused for within is found at its features, and not in its file."""
    try:
        yield
    except VideoError as error:
        error.stage = "features"
        raise


def compute_features(
    video: VideoFeatures, frames: Iterable[npt.NDArray[np.uint8]], solve: SolveFlow, spool: Spool, clock: Stopwatch
) -> None:
    """Push all RGB frames of a video, and the flow that `solve` makes of them in grey, as they come."""

    def push(stream: Stream, frame: Frame) -> None:
        with clock.of("features"):
            video.push(stream, frame)
            spool.add(video.take())

    def iter_grey() -> Iterator[npt.NDArray[np.uint8]]:
        for frame in frames:
            if "rgb" in video.streams:
                push("rgb", frame)
            # Of the frame after resizing: flow that is resized itself would need its vectors scaled.
            yield cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)

    if "flow" not in video.streams:
        for frame in frames:
            push("rgb", frame)
        return
    for codes in clock.through("flow", solve(iter_grey())):
        push("flow", codes)


def solve_here(task: FeatureTask, backend: str) -> SolveFlow:
    """Flow in this process, in stacked codes (2H, W)."""

    def solve(grey: Iterable[npt.NDArray[np.uint8]]) -> Iterator[codec.Codes]:
        for flow in tvl1.iter_flow(grey, preset=task.flow_preset, backend=backend):
            yield codec.stack_components(codec.quantise(flow, task.scale))

    return solve


def describe_decoding(task: FeatureTask) -> Values:
    """How frames come about, for the sidecar."""
    if task.data is not None:
        return {"data": task.data[0], "data_fingerprint": task.data[1], "frames": "as they are stored"}
    decode = asdict(task.decode)
    return {name: value for name, value in decode.items() if name not in LIMITS} | {"filter": "swscale, bilinear"}


def describe_flow(task: FeatureTask, kernel: str) -> Values | None:
    """The convention of flow, and what computes it, for the sidecar; None without the stream."""
    if "flow" not in task.streams:
        return None
    convention: Values = {**asdict(task.scale), "direction": "t_to_t+1", "unit": "px_per_frame"}
    if not task.computes_flow:
        return {**convention, "computed": "when the shards were made"}
    tvl1_settings = {"preset": task.flow_preset, **asdict(tvl1.PRESETS[task.flow_preset])}
    return {**convention, "tvl1": tvl1_settings, "kernel": kernel}
