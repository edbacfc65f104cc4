"""I3D's features of windows of videos: what the network knows before its classifier, with the time they belong to.

Windows of `window` frames begin every `step` frames; the frames after the last whole window are left out, and a video
shorter than one window is looped to one. A feature vector is Mixed_5c averaged as before the classifier: 1024 numbers
at width 1. Videos come from shards, or are decoded and their flow computed on the spot; frames are taken as they come,
so memory does not grow with a video's length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
import ray.data
import torch

from models.contract import FRAMES_PER_SECOND
from models.folding import fold
from models.i3d import I3D
from pipelines.clips import centre_crop, decoded_side, resize_for_crop, scale_clips
from pipelines.evaluation import BATCH, Entry, configure_ray_data, find_device
from pipelines.ingest import MAX_WORKER_DEATHS, open_video
from pipelines.networks import Network, NetworkError
from pipelines.raw_video import iter_flow, iter_frames
from pipelines.video import VideoError
from pipelines.video_index import VideoIndex

CHUNK = 64  # frames of a stored video that are decoded at a time
MAX_BLOCKS = 2000  # of a graph

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Frames of a window, and from one window's first frame to the next one's."""

    window: int = 64
    step: int = 64

    def __post_init__(self) -> None:
        if min(self.window, self.step) < 1:
            raise ValueError(f"--window is {self.window}, --step {self.step}: give at least 1 frame each")

    def cut(self, frames: Iterable[npt.NDArray]) -> Iterator[npt.NDArray]:
        """Each window (window, H, W, C), once its last frame has come; a shorter video's only one is it, looped."""
        held: deque[npt.NDArray] = deque(maxlen=self.window)
        count = 0
        for count, frame in enumerate(frames, start=1):
            held.append(frame)
            if count >= self.window and (count - self.window) % self.step == 0:
                yield np.stack(list(held))
        if 0 < count < self.window:
            yield np.stack([held[index % count] for index in range(self.window)])


@dataclass(frozen=True, kw_only=True)
class ReadVideo:
    """The frames of a video by its place: from shards, or from raw files."""

    source: VideoIndex | Sequence[str]
    flow_preset: str = "faithful"

    def __call__(self, place: int, network: Network) -> Iterator[npt.NDArray]:
        """All frames of the network's stream, (H, W, C) each: uint8 RGB, or flow in pixels."""
        stream = network.streams[0]
        if isinstance(self.source, VideoIndex):
            return _iter_stored(self.source.row(place), stream)
        frames = iter_frames(self.source[place], short_side=decoded_side(network.model.contract, network.settings))
        return iter(frames) if stream == "rgb" else iter_flow(frames, self.flow_preset)


def _iter_stored(video: Mapping[str, Any], stream: str) -> Iterator[npt.NDArray]:
    read = open_video(video, [stream])
    count = video["num_frames"] - (stream == "flow")
    for start in range(0, count, CHUNK):
        yield from read(stream, start, min(start + CHUNK, count))


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """What features are extracted with; `use_gpu`: one GPU for each worker."""

    entries: tuple[Entry, ...]
    windows: Windows
    num_workers: int = 1
    use_gpu: bool = False


class ExtractFeatures:
    """The step from a video's place to its feature vectors; keeps its networks from video to video."""

    def __init__(self, extractor: Extractor, read: ReadVideo) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.windows, self.read = extractor.windows, read
        self.device = find_device(use_gpu=extractor.use_gpu)
        self.networks = _load_networks(extractor.entries)
        self.models = _prepare_models(extractor.entries, self.device)

    def __call__(self, row: Row) -> Row:
        place = int(row["id"])
        found: Row = {"place": place, "error": "", "storage_error": ""}
        try:
            return found | {f"features_{name}": self._extract(place, name) for name in self.networks}
        except (FileNotFoundError, PermissionError) as error:
            found["error"] = str(error)
        except (ValueError, LookupError, VideoError, av.FFmpegError, cv2.error) as error:
            found["error"] = f"{type(error).__name__}: {error}"[:500]
        except OSError as error:
            found["storage_error"] = str(error)
        return found | {f"features_{name}": np.zeros((0, 0), np.float32) for name in self.networks}

    @torch.no_grad()
    def _extract(self, place: int, name: str) -> npt.NDArray[np.float32]:
        """(windows, features) float32."""
        network = self.networks[name]
        contract, settings, stream = network.model.contract, network.settings, network.streams[0]
        frames = (
            centre_crop(resize_for_crop(frame[None], contract, settings), contract.size)[0]
            for frame in self.read(place, network)
        )
        vectors = []
        for windows in _batches(self.windows.cut(frames)):
            clips = scale_clips(stream, torch.from_numpy(windows).to(self.device), settings.flow_bound)
            vectors.append(self.models[name].pooled_features(clips).float().cpu())
        if not vectors:
            raise ValueError(f"there is no {stream} frame; flow needs videos of at least two frames")
        return torch.cat(vectors).numpy()


def _batches(windows: Iterator[npt.NDArray]) -> Iterator[npt.NDArray]:
    """Up to BATCH windows at a time, stacked."""
    held: list[npt.NDArray] = []
    for window in windows:
        held.append(window)
        if len(held) == BATCH:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack(held)


@dataclass(frozen=True, kw_only=True)
class ExtractOnCpu:
    """The same as a task of a CPU, whose process keeps the networks for the next one."""

    extractor: Extractor
    read: ReadVideo

    def __call__(self, row: Row) -> Row:
        return ExtractFeatures(self.extractor, self.read)(row)


def load_i3d(entry: Entry) -> Network:
    """The network of an entry; NetworkError where it is no I3D."""
    network = entry.load()
    if not isinstance(network.model, I3D):
        raise NetworkError(f"--{entry.name} {entry.uri}: features are I3D's; this is another network")
    return network


@lru_cache(maxsize=1)
def _load_networks(entries: tuple[Entry, ...]) -> dict[str, Network]:
    return {entry.name: load_i3d(entry) for entry in entries}


@lru_cache(maxsize=1)
def _prepare_models(entries: tuple[Entry, ...], device: torch.device) -> dict[str, Any]:
    """The networks as they compute: on a CPU folded, on a GPU as they are."""
    loaded = {name: network.model.eval() for name, network in _load_networks(entries).items()}
    if device.type == "cpu":
        return {name: fold(model) for name, model in loaded.items()}
    return {name: model.to(device) for name, model in loaded.items()}  # CUDA: not measured


def check_windows(windows: Windows, networks: Mapping[str, Network]) -> None:
    """ValueError where a window is too short for a network."""
    for network in networks.values():
        assert isinstance(network.model, I3D)
        network.model.check_frames(windows.window)


def extract_features(extractor: Extractor, read: ReadVideo, places: Sequence[int]) -> Iterator[Row]:
    """Rows `place`, `error` and `features_NAME` (windows, features) of the videos at these places, in their order.

    Ray must be running. Raises OSError where the storage fails.
    """
    configure_ray_data()
    graph = ray.data.from_items([{"id": place} for place in places], override_num_blocks=min(len(places), MAX_BLOCKS))
    graph.context.execution_options.preserve_order = True
    if extractor.use_gpu:
        actors = ray.data.ActorPoolStrategy(size=extractor.num_workers)
        given = (extractor, read)
        graph = graph.map(ExtractFeatures, fn_constructor_args=given, compute=actors, num_cpus=0, num_gpus=1)
    else:
        tasks = ray.data.TaskPoolStrategy(size=extractor.num_workers)
        step = ExtractOnCpu(extractor=extractor, read=read)
        graph = graph.map(step, compute=tasks, num_cpus=1, max_retries=MAX_WORKER_DEATHS)
    for row in graph.iter_rows():
        if row["storage_error"]:  # no video's fault
            raise OSError(row["storage_error"])
        yield row


def seconds_of(windows: Windows, count: int) -> list[tuple[float, float]]:
    """When each of `count` windows begins and ends, in seconds of the video."""
    starts = [index * windows.step for index in range(count)]
    return [(start / FRAMES_PER_SECOND, (start + windows.window) / FRAMES_PER_SECOND) for start in starts]
