"""I3D's features of windows of videos: what the network knows before its classifier, with the time they belong to.

Windows of `window` frames begin every `step` frames; the frames after the last whole window are left out, and a video
shorter than one window is looped to one. A feature vector is Mixed_5c averaged as before the classifier: 1024 numbers
at width 1. Videos come from shards, or are decoded and their flow computed on the spot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import av
import cv2
import numpy as np
import numpy.typing as npt
import ray.data
import torch

from models.i3d import I3D
from models.input_spec import FRAMES_PER_SECOND
from pipelines.clips.loader import MAX_WORKER_DEATHS, open_row
from pipelines.clips.sampling import centre_crop, decoded_side, resize_for_crop, scale_clips
from pipelines.datasets.shards import Row
from pipelines.datasets.video_index import VideoIndex
from pipelines.errors import NetworkError, SettingsError, VideoError
from pipelines.evaluation.raw_video import compute_flow, decode_frames
from pipelines.evaluation.scoring import NetworkSource, configure_ray_data
from pipelines.training.trained_network import Network

BATCH = 8  # windows that go through a network at a time


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
        starts = range(0, max(1, length - self.window + 1), self.step)
        return [np.arange(start, start + self.window) % length for start in starts]


class ReadVideo:
    """The frames of a video by its place: from shards, or from raw files."""

    def __init__(self, source: VideoIndex | Sequence[str], *, flow_preset: str = "faithful") -> None:
        self.source, self.flow_preset = source, flow_preset

    def __call__(self, place: int, network: Network) -> npt.NDArray:
        """All frames of the network's stream, (T, H, W, C): uint8 RGB, or flow in pixels."""
        stream = network.streams[0]
        if isinstance(self.source, VideoIndex):
            return open_row(self.source.row(place), [stream])(stream, 0, None)
        frames = decode_frames(self.source[place], short_side=decoded_side(network.model.input_spec, network.settings))
        return frames if stream == "rgb" else compute_flow(frames, self.flow_preset)


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """What features are extracted with; `use_gpu`: one GPU for each worker."""

    sources: tuple[NetworkSource, ...]
    windows: Windows
    num_workers: int = 1
    use_gpu: bool = False


class ComputeFeatures:
    """The step from a video's place to its feature vectors; keeps its networks from video to video."""

    def __init__(self, extractor: Extractor, read: ReadVideo) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.windows, self.read = extractor.windows, read
        self.device = torch.device("cuda" if extractor.use_gpu else "cpu")
        self.networks = _load_networks(extractor.sources)
        for network in self.networks.values():
            network.model.eval().to(self.device)  # CUDA: not measured

    def __call__(self, row: Row) -> Row:
        place = int(row["id"])
        extracted: Row = {"place": place, "error": ""}
        try:
            extracted |= {f"features_{name}": self._extract(place, network) for name, network in self.networks.items()}
        except (ValueError, LookupError, OSError, VideoError, av.FFmpegError, cv2.error) as error:
            empty = {f"features_{name}": np.zeros((0, 0), np.float32) for name in self.networks}
            extracted |= {"error": f"{type(error).__name__}: {error}"[:500], **empty}
        return extracted

    @torch.no_grad()
    def _extract(self, place: int, network: Network) -> npt.NDArray[np.float32]:
        """(windows, features) float32."""
        model, settings, stream = network.model, network.settings, network.streams[0]
        assert isinstance(model, I3D)
        frames = self.read(place, network)
        if len(frames) == 0:
            raise ValueError(f"there is no {stream} frame; flow needs videos of at least two frames")
        frames = centre_crop(resize_for_crop(frames, model.input_spec, settings), model.input_spec.size)
        vectors = []
        for first in range(0, len(chosen := self.windows.indices(len(frames))), BATCH):
            clips = torch.from_numpy(np.stack([frames[window] for window in chosen[first : first + BATCH]]))
            vectors.append(model.pooled_features(scale_clips(stream, clips.to(self.device), settings.bound)).cpu())
        return torch.cat(vectors).numpy()


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
    """The same as a task of a CPU, whose process keeps the networks for the next one."""

    extractor: Extractor
    read: ReadVideo

    def __call__(self, row: Row) -> Row:
        return ComputeFeatures(self.extractor, self.read)(row)


@lru_cache(maxsize=1)
def _load_networks(sources: tuple[NetworkSource, ...]) -> dict[str, Network]:
    return {source.name: load_i3d(source) for source in sources}


def extract_features(extractor: Extractor, read: ReadVideo, places: range) -> list[Row]:
    """Rows `place`, `error` and `features_NAME` (windows, features) of the videos at these places, in order."""
    configure_ray_data()
    graph = ray.data.from_items([{"id": place} for place in places], override_num_blocks=len(places))
    if extractor.use_gpu:
        actors = ray.data.ActorPoolStrategy(size=extractor.num_workers)
        given = (extractor, read)
        graph = graph.map(ComputeFeatures, fn_constructor_args=given, compute=actors, num_cpus=0, num_gpus=1)
    else:
        tasks = ray.data.TaskPoolStrategy(size=extractor.num_workers)
        step = ExtractOnCpu(extractor=extractor, read=read)
        graph = graph.map(step, compute=tasks, num_cpus=1, max_retries=MAX_WORKER_DEATHS)
    return sorted(graph.iter_rows(), key=lambda row: row["place"])


def seconds_of(windows: Windows, count: int) -> list[tuple[float, float]]:
    """When each of `count` windows begins and ends, in seconds of the video."""
    starts = [index * windows.step for index in range(count)]
    return [(start / FRAMES_PER_SECOND, (start + windows.window) / FRAMES_PER_SECOND) for start in starts]
