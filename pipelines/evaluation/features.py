"""I3D's features of windows of videos: what the network knows before its classifier, with the time they belong to.

Windows of `window` frames begin every `step` frames; the frames after the last whole window are left out, and a video
shorter than one window is looped to one. A feature vector is Mixed_5c averaged as before the classifier: 1024 numbers
at width 1. Videos come from shards, or are decoded and their flow computed on the spot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import ray.data
import torch

from models import cuda
from models.folding import fold_batch_norm
from models.i3d import I3D
from models.input_spec import FRAMES_PER_SECOND, InputSpec
from pipelines.clips.loader import open_row
from pipelines.clips.sampling import ClipSettings, centre_crop, decoding_of, resize_for_crop, scale_clips
from pipelines.datasets.shards import Row
from pipelines.datasets.video_index import VideoIndex
from pipelines.errors import NetworkError, SettingsError, VideoError
from pipelines.evaluation.raw_video import compute_flow, read_video
from pipelines.evaluation.scoring import NetworkSource, set_up, unless_refused
from pipelines.media.codec import DECODING_ERRORS
from pipelines.ray_data import ON_CPU, quieten
from pipelines.training.trained_network import Network

BATCH = 8  # windows that go through a network at a time
READING_ERRORS = (VideoError, *DECODING_ERRORS)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Frames of a window, and from one window's first frame to the next one's."""

    window: int = 64
    step: int = 64

    def __post_init__(self) -> None:
        if min(self.window, self.step) < 1:
            raise SettingsError(f"--window is {self.window}, --step {self.step}: give at least 1 frame each")

    def indices(self, length: int) -> list[npt.NDArray[np.int64]]:
        """The frames of each window of a stream of `length` frames."""
        starts = range(0, max(1, length - self.window + 1), self.step)  # at least one window
        return [np.arange(start, start + self.window) % length for start in starts]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a network wants of a video: the stream, and how its frames are resized and cropped."""

    stream: str
    input_spec: InputSpec
    settings: ClipSettings

    def crop(self, frames: npt.NDArray) -> npt.NDArray:
        """(T, size, size, C) of (T, H, W, C) frames. Raises ValueError where there is none."""
        if len(frames) == 0:
            raise ValueError(f"there is no {self.stream} frame; flow needs videos of at least two frames")
        return centre_crop(resize_for_crop(frames, self.input_spec, self.settings), self.input_spec.size)


class ReadVideo:
    """The frames of a video by its place: from shards, or from raw files."""

    def __init__(self, source: VideoIndex | Sequence[str], *, flow_preset: str = "faithful") -> None:
        self.source, self.flow_preset = source, flow_preset

    def computes_flow(self, wanted: Wanted) -> bool:
        """Whether what is decoded is RGB that flow has yet to be computed from."""
        return wanted.stream == "flow" and not isinstance(self.source, VideoIndex)

    def decode(self, place: int, wanted: Wanted) -> npt.NDArray:
        """All frames (T, H, W, C) that are stored: uint8 RGB, or of shards flow in pixels."""
        if isinstance(self.source, VideoIndex):
            return open_row(self.source.row(place), [wanted.stream])(wanted.stream, 0, None)
        # At the size at which the flow of the training was computed: TV-L1 at another size is another flow.
        return read_video(self.source[place], decoding_of(wanted.input_spec, wanted.settings)).frames

    def finish(self, frames: npt.NDArray, wanted: Wanted) -> npt.NDArray:
        """The frames that the network sees, (T, size, size, C): uint8 RGB, or flow in pixels."""
        # Flow first, then the crop: training saw flow of whole frames, and that of a crop differs near its border.
        return wanted.crop(compute_flow(frames, self.flow_preset) if self.computes_flow(wanted) else frames)


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """What features are extracted with; `use_gpu`: one GPU for each worker."""

    sources: tuple[NetworkSource, ...]
    windows: Windows
    precision: str = "fp32"
    num_workers: int = 1
    use_gpu: bool = False


class DecodeVideo:
    """The step from a video's place to frames, for each network: all that needs no GPU where one comes after it."""

    def __init__(self, read: ReadVideo, wanted: Mapping[str, Wanted]) -> None:
        self.read, self.wanted = read, wanted

    def __call__(self, row: Row) -> Row:
        # A task reserves one CPU; OpenCV, and torch below, would take them all.
        cv2.setNumThreads(1)
        place = int(row["id"])
        try:
            decoded = {f"frames_{name}": self._decode(place, wanted) for name, wanted in self.wanted.items()}
        except READING_ERRORS as error:
            # All columns in every row: blocks of different columns would not join.
            nothing = {f"frames_{name}": np.zeros((0, 0, 0, 0), np.uint8) for name in self.wanted}
            return {"place": place, "error": _describe(error), **nothing}
        return {"place": place, "error": "", **decoded}

    def _decode(self, place: int, wanted: Wanted) -> npt.NDArray:
        frames = self.read.decode(place, wanted)
        return frames if self.read.computes_flow(wanted) else self.read.finish(frames, wanted)


class ComputeFeatures:
    """The step from decoded frames to feature vectors; keeps its networks, folded, from video to video."""

    def __init__(self, extractor: Extractor, read: ReadVideo) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.windows, self.read = extractor.windows, read
        self.device, self.refusal = set_up(extractor.precision, use_gpu=extractor.use_gpu)
        self.wanted, self.models = _prepare(extractor.sources, extractor.precision, self.device)

    def __call__(self, row: Row) -> Row:
        nothing = {f"features_{name}": np.zeros((0, 0), np.float32) for name in self.models}
        facts = {"place": row["place"], "error": row["error"], "refusal": self.refusal}
        if row["error"] or self.refusal:
            return facts | nothing
        try:
            return facts | {f"features_{name}": self._extract(name, row[f"frames_{name}"]) for name in self.models}
        except READING_ERRORS as error:
            return facts | nothing | {"error": _describe(error)}

    @torch.no_grad()
    def _extract(self, name: str, frames: npt.NDArray) -> npt.NDArray[np.float32]:
        """(windows, features) float32."""
        model, wanted = self.models[name], self.wanted[name]
        # The flow of raw video is computed here, after the object store, because here may be the GPU.
        frames = self.read.finish(frames, wanted) if self.read.computes_flow(wanted) else frames
        vectors = []
        for first in range(0, len(chosen := self.windows.indices(len(frames))), BATCH):
            clips = torch.from_numpy(np.stack([frames[window] for window in chosen[first : first + BATCH]]))
            # Moved first: RGB travels as bytes and becomes floats on the device.
            scaled = scale_clips(wanted.stream, clips.to(self.device), wanted.settings.bound)
            vectors.append(model.pooled_features(scaled).cpu())
        return torch.cat(vectors).numpy()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def want(networks: Mapping[str, Network]) -> dict[str, Wanted]:
    """What each network wants of a video."""
    return {
        name: Wanted(stream=network.streams[0], input_spec=network.model.input_spec, settings=network.settings)
        for name, network in networks.items()
    }


def load_i3d(source: NetworkSource) -> Network:
    """The network that lies there; NetworkError where it is no I3D."""
    network = source.load()
    if not isinstance(network.model, I3D):
        raise NetworkError(f"--{source.name} {source.uri}: features are I3D's; this is another network")
    return network


def check_windows(windows: Windows, networks: Mapping[str, Network]) -> None:
    """ValueError where a window is too short for a network."""
    for network in networks.values():
        assert isinstance(network.model, I3D)
        network.model.check_frames(windows.window)


@dataclass(frozen=True, kw_only=True)
class ExtractOnCpu:
    """Both steps as one task of a CPU, whose process keeps the networks for the next one."""

    extractor: Extractor
    read: ReadVideo
    decode: DecodeVideo

    def __call__(self, row: Row) -> Row:
        # Made for each video at no cost: _prepare keeps the folded networks of this process.
        return ComputeFeatures(self.extractor, self.read)(self.decode(row))


@lru_cache(maxsize=1)
def _prepare(
    sources: tuple[NetworkSource, ...], precision: str, device: torch.device
) -> tuple[dict[str, Wanted], dict[str, Any]]:
    """What each network wants, and the network, folded."""
    networks = {source.name: load_i3d(source) for source in sources}
    folded = {name: fold_batch_norm(network.model, dtype=cuda.DTYPES[precision]) for name, network in networks.items()}
    return want(networks), {name: cuda.place(model, device) for name, model in folded.items()}


def extract_features(extractor: Extractor, read: ReadVideo, wanted: Mapping[str, Wanted], places: range) -> list[Row]:
    """Rows `place`, `error` and `features_NAME` (windows, features) of the videos at these places, in order.

    Ray must be running. On CPUs a task decodes and extracts; with GPUs decoding is tasks on CPUs of their own, and the
    flow of raw files is computed on the GPU. Raises RunError where a GPU computes wrong numbers.
    """
    quieten()
    decode = DecodeVideo(read, wanted)
    # A video a block: each is a task of its own, and a long one holds up no other.
    graph = ray.data.from_items([{"id": place} for place in places], override_num_blocks=len(places))
    if extractor.use_gpu:
        actors = ray.data.ActorPoolStrategy(size=extractor.num_workers)
        given = (extractor, read)
        graph = graph.map(decode, **ON_CPU)
        # No CPU: decoding may have taken them all, and the actor would wait for one.
        graph = graph.map(ComputeFeatures, fn_constructor_args=given, compute=actors, num_cpus=0, num_gpus=1)
    else:
        tasks = ray.data.TaskPoolStrategy(size=extractor.num_workers)
        step = ExtractOnCpu(extractor=extractor, read=read, decode=decode)
        graph = graph.map(step, compute=tasks, **ON_CPU)
    # Ray Data hands them over as they are done.
    return sorted(unless_refused(graph.iter_rows()), key=lambda row: row["place"])


def seconds_of(windows: Windows, count: int) -> list[tuple[float, float]]:
    """When each of `count` windows begins and ends, in seconds of the video."""
    starts = [index * windows.step for index in range(count)]
    return [(start / FRAMES_PER_SECOND, (start + windows.window) / FRAMES_PER_SECOND) for start in starts]
