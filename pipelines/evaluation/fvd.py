"""Fréchet Video Distance: from two sets of videos to I3D's vectors of their clips, and from those to a number.

One Ray Data graph reads clips and runs the network; what cannot be decoded, or is too short, is told with its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import ray.data
import torch
from torch import Tensor, nn

from models import cuda
from models.folding import fold_batch_norm
from models.i3d import I3D
from models.torchscript import TorchScriptI3D, is_torchscript
from pipelines import storage
from pipelines.clips.numbered import open_row
from pipelines.clips.sampling import Frames
from pipelines.datasets.catalog import read_catalog
from pipelines.datasets.records import DATASET
from pipelines.datasets.shards import Row
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import DataError, NetworkError, OutageError, SettingsError, VideoError
from pipelines.evaluation.frechet import FeatureStatistics, describe_features
from pipelines.evaluation.fvd_clips import DIALECTS, ClipChoice, DialectName, prepare_clips
from pipelines.evaluation.records import SetCounts
from pipelines.evaluation.scoring import (
    describe_error,
    read_and_compute,
    set_up,
    unless_away,
    unless_refused,
)
from pipelines.formatting import format_count
from pipelines.media.codec import DECODING_ERRORS
from pipelines.media.decode import DecodeSettings
from pipelines.media.decoder_process import process_decoder
from pipelines.ray_data import quieten
from pipelines.training.trained_network import hash_weights, load_network
from pipelines.training.weights_files import find_checkpoint, local_checkpoint

Clips = npt.NDArray[np.uint8]  # (clips, T, H, W, 3) RGB

BATCH = 8  # clips that go through the network at a time
READING_ERRORS = (VideoError, *DECODING_ERRORS)
# Frames pass one by one and only clips are kept, so that a long video costs time and no memory.
DECODING = DecodeSettings(fps="native", frame_size="native", max_frames=1 << 30)


@dataclass(frozen=True, kw_only=True)
class VideoSet:
    """The videos of one side of the distance: raw files, or rows of shards."""

    name: str
    ids: tuple[str, ...]
    uris: tuple[str, ...] = ()
    index: VideoIndex | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def choose(self, count: int | None, seed: int) -> list[int]:
        """Places of `count` of the videos, drawn from the seed, in order; all where there are no more."""
        if count is None or count >= len(self):
            return list(range(len(self)))
        return sorted(np.random.default_rng(seed).permutation(len(self))[:count].tolist())

    def read(self, place: int, choice: ClipChoice) -> Clips:
        """The clips of the video at a place. Raises ShortVideoError, or what a decoder or storage raises."""
        clips, length = self._read_row(place, choice) if self.index is not None else self._read_file(place, choice)
        if not clips:
            raise ShortVideoError(f"it has {format_count(length, 'frame')}, a clip spans {choice.span}")
        return np.stack(clips)

    def _read_file(self, place: int, choice: ClipChoice) -> tuple[Sequence[Frames], int]:
        with storage.local_copy(self.uris[place]) as path:
            frames = process_decoder(DECODING).frames(path)
            try:
                return choice.select(frames, self.ids[place])
            finally:
                frames.close()

    def _read_row(self, place: int, choice: ClipChoice) -> tuple[Sequence[Frames], int]:
        assert self.index is not None
        video = self.index.row(place)
        starts = choice.starts(video["num_frames"], video["id"])
        if not starts:
            return [], video["num_frames"]
        read = open_row(video, ["rgb"])
        clips = [read("rgb", start, start + choice.span)[:: choice.frame_step] for start in starts]
        return clips, video["num_frames"]


class ShortVideoError(ValueError):
    """A video with fewer frames than a clip."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What turns clips into vectors: the network's file, the dialect, and which frames make a clip."""

    weights: str
    dialect: DialectName
    choice: ClipChoice
    trust_torchscript: bool = False

    def load(self) -> Embedder:
        """The network. Raises NetworkError where there is none, or it is none for this dialect and these clips."""
        with local_checkpoint(find_checkpoint(self.weights)) as path:
            if is_torchscript(path):
                return Embedder(self, self._run(path))
        try:
            model = load_network(self.weights, stream="rgb").model
        except NetworkError as error:
            raise NetworkError(f"--weights {error}") from error
        if not isinstance(model, I3D):
            raise NetworkError(f"--weights {self.weights}: FVD is computed with I3D; this is another network")
        try:
            model.check_frames(self.choice.frames)
        except ValueError as error:
            raise SettingsError(f"--frames is {self.choice.frames}: {error}") from error
        return Embedder(self, model)

    def _run(self, path: str) -> TorchScriptI3D:
        if DIALECTS[self.dialect].output == "features":
            raise NetworkError(
                f"--weights {self.weights} is a TorchScript file, which gives logits only: --dialect features takes "
                "the released RGB weights"
            )
        try:
            return TorchScriptI3D(path, trusted=self.trust_torchscript)
        except (ValueError, RuntimeError) as error:
            raise NetworkError(f"--weights {self.weights}: {str(error).splitlines()[0]}") from error


class Embedder:
    """A network as loaded, on the CPU until it is placed."""

    def __init__(self, embedding: Embedding, model: I3D | TorchScriptI3D) -> None:
        self.embedding, self.dialect = embedding, DIALECTS[embedding.dialect]
        self.hash = model.sha256 if isinstance(model, TorchScriptI3D) else hash_weights(model)
        self.model: nn.Module = model
        self.device = torch.device("cpu")

    def place(self, device: torch.device) -> Embedder:
        """The same network, ready to compute there."""
        self.device = device
        if isinstance(self.model, TorchScriptI3D):
            self.model = self.model.to(device)
        else:
            self.model = cuda.place(fold_batch_norm(self.model), device)
        return self

    def describe(self) -> dict[str, object]:
        """All that decides what a vector is; two sets are comparable where it is the same."""
        choice = self.embedding.choice
        return {
            "dialect": self.embedding.dialect,
            "frames": choice.frames,
            "frame_step": choice.frame_step,
            "weights_sha256": self.hash,
        }

    @torch.no_grad()
    def __call__(self, clips: Clips) -> npt.NDArray[np.float32]:
        """The vectors (N, D) of clips (N, T, H, W, 3) uint8."""
        # A copy: Ray's arrays are views of the object store, which tensors may not write to.
        parts = torch.from_numpy(np.array(clips)).split(BATCH)
        return torch.cat([self._embed(part.to(self.device)).float().cpu() for part in parts]).numpy()

    def _embed(self, clips: Tensor) -> Tensor:
        if isinstance(self.model, TorchScriptI3D) and self.dialect.shorter_side is None:
            return self.model.resized(clips.permute(0, 4, 1, 2, 3).float())
        prepared = prepare_clips(clips, self.dialect)
        # The folded copy keeps its class's methods, and type checkers take a module's for tensors.
        return self.model.pooled_features(prepared) if self.dialect.output == "features" else self.model(prepared)  # type: ignore[operator]


def find_videos(uri: str, split: str | None = None) -> tuple[VideoSet, dict[str, str]]:
    """The videos of a folder of files or of a data set of shards, and why others that it names cannot be had.

    `split` is one of shards. Raises CatalogError or DataError where there is no video.
    """
    if not storage.exists(storage.join(uri, DATASET)):
        if split is not None:
            raise SettingsError(f"--split is {split}, and {uri} is no data set of shards, whose videos have splits")
        table = read_catalog(uri, layout="flat").table
        return VideoSet(name=uri, ids=tuple(table["id"].to_pylist()), uris=tuple(table["path"].to_pylist())), {}
    index = read_index(uri)
    index = index.of_split(split) if split is not None else index
    usable = index.table.filter(pc.equal(index.table["status"], "ok"))
    lost = index.table.filter(pc.not_equal(index.table["status"], "ok")).select(["id", "status", "error_kind"])
    reasons = {row["id"]: row["error_kind"] or row["status"] for row in lost.to_pylist()}
    if not len(usable):
        raise DataError(f"{uri} holds no usable video")
    return VideoSet(name=uri, ids=tuple(usable["id"].to_pylist()), index=replace(index, table=usable)), reasons


class ReadClips:
    """The step from a video's place in its set to its clips."""

    def __init__(self, videos: VideoSet, choice: ClipChoice) -> None:
        self.videos, self.choice = videos, choice

    def __call__(self, row: Row) -> Row:
        # A task reserves one CPU; OpenCV would take them all.
        cv2.setNumThreads(1)
        place = int(row["id"])
        try:
            return {"place": place, "error": "", "clips": self.videos.read(place, self.choice)}
        except READING_ERRORS as error:
            # All columns in every row: blocks of different columns would not join.
            return {"place": place, "error": self._describe(error), "clips": np.zeros((0, 0, 0, 0, 3), np.uint8)}

    def _describe(self, error: Exception) -> str:
        if self.videos.index is not None:
            return describe_error(error, self.videos.index.data)
        try:
            if not isinstance(error, ShortVideoError):
                # Without its folder any video looks broken, and the distance would be of those read before.
                storage.check_answers(self.videos.name)
        except OutageError as away:
            error = away
        return describe_error(error, None)


class EmbedClips:
    """The step from clips to vectors; keeps its network from video to video."""

    def __init__(self, embedding: Embedding, use_gpu: bool) -> None:
        torch.set_num_threads(1)
        self.device, self.refusal = set_up("fp32", use_gpu=use_gpu)
        self.embedder = embedding.load().place(self.device)

    def __call__(self, row: Row) -> Row:
        facts = {"place": row["place"], "error": row["error"], "refusal": self.refusal}
        if row["error"] or self.refusal:
            return facts | {"vectors": np.zeros((0, 0), np.float32)}
        return facts | {"vectors": self.embedder(row["clips"])}


def embed_videos(
    videos: VideoSet, places: Sequence[int], embedding: Embedding, *, num_workers: int, use_gpu: bool
) -> Iterator[Row]:
    """Rows `place`, `error`, `vectors` (clips, D) of the videos at these places, as they are done.

    Ray must be running. On CPUs a task reads and computes; with GPUs reading is tasks on CPUs of their own. Raises
    OutageError where the videos cannot be reached, RunError where a GPU computes wrong numbers.
    """
    quieten()
    read = ReadClips(videos, embedding.choice)
    # A video a block: each is a task of its own, and a long one holds up no other.
    graph = ray.data.from_items([{"id": place} for place in places], override_num_blocks=len(places))
    graph = read_and_compute(graph, read, EmbedClips, (embedding, use_gpu), num_workers=num_workers, use_gpu=use_gpu)
    yield from unless_away(unless_refused(graph.iter_rows()))


def summarise_set(
    videos: VideoSet, lost: Mapping[str, str], rows: Sequence[Row], embedder: Embedder
) -> tuple[FeatureStatistics | None, SetCounts]:
    """The statistics of one side, None of fewer than two clips, and what became of its videos."""
    rows = sorted(rows, key=lambda row: row["place"])  # sums in floats depend on their order
    vectors = [row["vectors"] for row in rows if not row["error"]]
    failed = {videos.ids[row["place"]]: row["error"] for row in rows if row["error"]}
    counts = SetCounts(
        name=videos.name,
        videos=len(rows) + len(lost),
        clips=sum(len(part) for part in vectors),
        failed={**lost, **failed},
    )
    if counts.clips < 2:
        return None, counts
    source = {"name": videos.name, "videos": counts.videos, "failed": len(counts.failed)}
    choice = embedder.embedding.choice
    source |= {"seed": choice.seed, "begin": choice.begin, "clips_per_video": choice.clips_per_video}
    try:
        statistics = describe_features(
            np.concatenate(vectors), unbiased=embedder.dialect.unbiased, embedding=embedder.describe(), source=source
        )
    except ValueError as error:  # values that are not finite
        raise NetworkError(f"--weights {embedder.embedding.weights}: of {videos.name} {error}") from error
    return statistics, counts
