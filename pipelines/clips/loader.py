"""Training clips from shards, streamed by Ray Data to each worker of a training.

Which clip comes when is arithmetic. The run's clips are numbered; number p is a video of a random order that is drawn
anew for each epoch from the seed, with a window, crop and mirroring drawn from the seed and p; where windows are shared
(`Augmentation.repeats`), so many numbers in a row have one video and window, not one crop. Step s takes the next
`batch × workers` numbers, each worker its own part of them. So every worker takes the same number of steps, a run that
is resumed goes on with the very clip it would have had, and nothing depends on timing.

Each worker streams its own part: tasks on any node read the rows they need, decode only the window, and hand over
cropped frames as they are stored, RGB as uint8 and flow as codes; these cross the object store once and become floats
on the device that trains. A clip that cannot be decoded is replaced by
another of its task with weight 0, and told; where storage is away, the stream ends with an error instead.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
import ray
import ray.data
import torch
from ray.data import DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata
from torch import Tensor

from models import cuda
from models.input_spec import InputSpec
from pipelines import storage
from pipelines.clips.augmentation import Augmentation, cut_training_clip, empty_clip
from pipelines.clips.sampling import (
    ClipSettings,
    EvaluationProtocol,
    cut_test_frames,
    flip_frames,
    needs_resize,
    scale_clips,
)
from pipelines.datasets import shards
from pipelines.datasets.video_index import VideoIndex
from pipelines.errors import OutageError
from pipelines.media.codec import (
    DECODING_ERRORS,
    Area,
    FlowScale,
    check_convention,
    decode_flow,
    decode_flow_codes,
    decode_rgb,
    decode_rgb_frames,
    dequantise,
    negate,
    scale_of,
)
from pipelines.ray_data import MAX_WORKER_DEATHS, quieten

TASK_BYTES = 64 << 20  # of the clips that one task cuts: enough work to hide Ray's overhead, little enough to hold
MAX_TASK_CLIPS = 64
TASKS_AHEAD = 4  # whose clips may wait in the object store, for each worker
# Ray Data counts a task whose output it has not measured with two blocks of 128 MiB: with less room than that beside
# the clips that wait, it sometimes starts no task any more.
UNMEASURED_BYTES = 768 << 20
SEGMENT_TASKS = 2_000  # in one Ray Data execution, which describes all of them before the first one runs

DATASET = "dataset.json"  # of a data set of shards; there as long as that is

logger = logging.getLogger(__name__)


Clip = dict[str, Any]
ReadRow = Callable[[Mapping[str, Any], list[str]], Clip]


class NumberedClips(ABC):
    """Clips known by their numbers: what the graph cuts."""

    videos: VideoIndex  # usable ones
    input_spec: InputSpec

    @abstractmethod
    def cut(self, number: int) -> Clip:
        """Clip `number`: `number`, `label`, `weight`, `error`, and its streams where the weight is not 0."""

    @abstractmethod
    def empty(self) -> Mapping[str, npt.NDArray]:
        """Streams of the same shapes and dtypes, without content."""

    def cut_all(self, numbers: Iterable[int]) -> list[Clip]:
        """The clips of these numbers, in their order."""
        return [self.cut(number) for number in numbers]

    @property
    def clips_per_task(self) -> int:
        """Clips that one task cuts, by their size."""
        num_bytes = sum(clip.nbytes for clip in self.empty().values())
        return max(1, min(MAX_TASK_CLIPS, TASK_BYTES // num_bytes))

    @property
    def scale(self) -> FlowScale | None:
        """How the flow of clips is coded; None where they hold pixels, or no flow."""
        return None

    def try_video(
        self, number: int, place: int, cut: Callable[[Clip, Clip], Clip], read: ReadRow | None = None
    ) -> Clip:
        """What `cut` makes of the video at a place of the index, given its row there and that in its shard.

        A video that cannot be decoded gives a clip without streams, of weight 0, with the reason as `error`. Raises
        OutageError where the fault is not the video's.
        """
        video = self.videos.row(place)
        clip = {"number": number, "label": video["label"], "weight": 1.0, "error": ""}
        for again in (True, False):
            try:
                return clip | cut(video, (read or read_stored)(video, list(self.input_spec.train.streams)))
            except DECODING_ERRORS as error:
                if is_of_storage(error):
                    check_storage(self.videos.data, error)
                    if again:  # it may have been away for a moment; what fails twice is the file's own fault
                        continue
                reason = f"{video['id']}: {type(error).__name__}: {error}"
                return clip | {"weight": 0.0, "error": reason[:500]}
        raise AssertionError("the second try returns")


def is_of_storage(error: Exception) -> bool:
    """Whether an error may come from where a file lies, rather than from what is in it."""
    return isinstance(error, OSError) and not isinstance(error, av.FFmpegError)


def check_storage(data: str, error: Exception) -> None:
    """Raises OutageError where an error of reading one file is not that file's own: the data set does not answer.

    A network that is down or credentials that have expired must not pass for videos that are broken.
    """
    try:
        # Asked like a shard is read: S3 answers a listing to some who may not read.
        storage.read_bytes(storage.join(data, DATASET))
    except OSError as reason:
        raise OutageError(f"{data} cannot be read: {error}") from reason


def read_stored(video: Mapping[str, Any], streams: list[str]) -> Clip:
    """The row of a shard that one row of a `VideoIndex` names; fetched are only the streams asked for.

    Raises ValueError where the shard holds another video there.
    """
    row = shards.read_row(video["file"], video["row"], streams, version=video["version"])
    if row["id"] != video["id"]:
        raise ValueError(f"row {video['row']} of {video['file']} is {row['id']}: the shard was changed")
    return row


def open_row(video: Mapping[str, Any], streams: list[str]) -> Callable[[str, int, int | None], npt.NDArray]:
    """A reader of frames (n, H, W, C), start to stop (None: the end), of a row as of `read_stored`: flow in pixels."""
    return partial(_read_window, read_stored(video, streams))


def _read_window(row: Clip, stream: str, start: int, stop: int | None) -> npt.NDArray:
    if stream == "rgb":
        return decode_rgb(row["rgb"], start=start, stop=stop)
    return decode_flow(row["flow"], row["convention"].flow, start=start, stop=stop)


@dataclass(frozen=True, kw_only=True)
class TrainingClips(NumberedClips):
    """The clips of a run; which video, window, crop and side clip `number` shows follows from the seed."""

    videos: VideoIndex
    input_spec: InputSpec
    settings: ClipSettings
    augmentation: Augmentation
    seed: int

    def video_of(self, number: int) -> int:
        """The place in the index of the video that clip `number` is cut from."""
        epoch, place = divmod(number // self.augmentation.repeats, len(self.videos))
        return int(_order(len(self.videos), self.seed, epoch)[place])

    @property
    def clips_per_task(self) -> int:
        repeats = self.augmentation.repeats
        return max(1, super().clips_per_task // repeats) * repeats  # no window is decoded by two tasks

    @property
    def scale(self) -> FlowScale | None:
        side = self.videos.sampling.shorter_side
        resized = self.settings.resize == "square" or needs_resize(side, side, self.input_spec, self.settings)
        # Flow that is resized is no longer made of codes.
        if resized or "flow" not in self.input_spec.train.streams:
            return None
        return scale_of(self.videos.convention.flow)

    def cut(self, number: int) -> Clip:
        return self._cut(number, _Window())

    def cut_all(self, numbers: Iterable[int]) -> list[Clip]:
        clips = []
        for _, together in groupby(numbers, lambda number: number // self.augmentation.repeats):
            window = _Window()
            clips += [self._cut(number, window) for number in together]
        return clips

    def _cut(self, number: int, window: _Window) -> Clip:
        """Clip `number`, of a window that holds what clips of the same one have read."""
        scale, repeats = self.scale, self.augmentation.repeats

        def cut(video: Clip, row: Clip) -> Clip:
            def read(stream: str, frames: Sequence[int], area: Area | None, *, mirrored: bool) -> npt.NDArray:
                if repeats > 1:
                    return window.read(row, stream, frames, area, mirrored=mirrored, in_codes=scale is not None)
                return _read_frames(row, stream, frames, area, mirrored=mirrored, in_codes=scale is not None)

            # A generator for each clip: it is the same whichever task and worker cuts it, and after any resume.
            rng = np.random.default_rng([self.seed, number])
            shared = np.random.default_rng([self.seed, number // repeats, repeats]) if repeats > 1 else None
            shape = video["num_frames"], video["height"], video["width"]
            spec, settings, augmentation = self.input_spec, self.settings, self.augmentation
            return cut_training_clip(read, shape, spec, settings, augmentation, rng, scale=scale, window=shared)

        return self.try_video(number, self.video_of(number), cut, window.row if repeats > 1 else None)

    def empty(self) -> Mapping[str, npt.NDArray]:
        return empty_clip(self.input_spec, self.scale)


class _Window:
    """What clips of one window have in common: the video's row, and the window's frames."""

    def __init__(self) -> None:
        self.rows: dict[str, Clip] = {}
        self.frames: dict[tuple[str, int], npt.NDArray] = {}

    def row(self, video: Mapping[str, Any], streams: list[str]) -> Clip:
        """As `read_stored`, once."""
        if video["id"] not in self.rows:
            self.rows[video["id"]] = read_stored(video, streams)
        return self.rows[video["id"]]

    def read(
        self, row: Clip, stream: str, frames: Sequence[int], area: Area | None, *, mirrored: bool, in_codes: bool
    ) -> npt.NDArray:
        """As `_read_frames`; whole frames are decoded, once, and each clip has its part of them."""
        key = stream, frames[0]
        if key not in self.frames:
            self.frames[key] = _read_frames(row, stream, frames, None, mirrored=False, in_codes=in_codes)
        found = self.frames[key]
        if area:
            rows, columns = area.slices
            found = found[:, rows, columns]
        if mirrored and in_codes and stream == "flow":
            u, v = np.moveaxis(found[:, :, ::-1], -1, 0)
            return np.stack([negate(u, scale_of(row["convention"].flow)), v], axis=-1)
        return flip_frames(found) if mirrored else found


def _read_frames(
    row: Clip, stream: str, frames: Sequence[int], area: Area | None, *, mirrored: bool, in_codes: bool
) -> npt.NDArray:
    """Frames of a row as of `read_stored`: uint8 RGB, flow in codes or in pixels."""
    if stream == "rgb":
        return decode_rgb_frames(row["rgb"], frames, area, mirrored=mirrored)
    convention = row["convention"].flow
    codes = decode_flow_codes(row["flow"], convention, frames, area, mirrored=mirrored)
    return codes if in_codes else dequantise(codes, scale_of(convention))


@dataclass(frozen=True, kw_only=True)
class ValidationClips(NumberedClips):
    """Number i is all test clips of video i, (N, T, S, S, C); beyond the last video weight 0, which fills up steps.

    The protocol must name a number of clips, so that all videos give the same shapes.
    """

    videos: VideoIndex
    input_spec: InputSpec
    settings: ClipSettings
    protocol: EvaluationProtocol

    def cut(self, number: int) -> Clip:
        if number >= len(self.videos):
            return {"number": number, "label": 0, "weight": 0.0, "error": ""}
        return self.try_video(
            number,
            number,
            lambda _, row: cut_test_frames(
                {stream: _read_window(row, stream, 0, None) for stream in self.input_spec.test.streams},
                self.input_spec,
                self.settings,
                self.protocol,
            ),
        )

    def empty(self) -> Mapping[str, npt.NDArray]:
        views = (self.protocol.num_clips or 1) * self.protocol.num_crops * (1 + self.protocol.flip)
        return {stream: np.repeat(clip[None], views, axis=0) for stream, clip in empty_clip(self.input_spec).items()}


# A task's numbers are of one epoch, or of two at its border.
@lru_cache(maxsize=4)
def _order(num_videos: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_videos)


@dataclass(frozen=True, kw_only=True)
class WorkerPart:
    """One worker's part of the clips from number `start` on: `batch` clips of each step, for `steps` steps."""

    start: int
    rank: int
    num_workers: int
    batch: int
    steps: int

    def numbers(self, first: int, count: int) -> list[int]:
        """The numbers of this worker's clips `first` to `first + count`, which end with its last step."""
        own = range(first, min(first + count, self.steps * self.batch))
        every = self.batch * self.num_workers
        return [self.start + i // self.batch * every + self.rank * self.batch + i % self.batch for i in own]

    def after(self, done: int, steps: int) -> WorkerPart:
        """The part of `steps` steps that follow the first `done`."""
        return replace(self, start=self.start + done * self.batch * self.num_workers, steps=steps)


class ClipSource(Datasource):
    """What Ray Data reads: a part's clips, one read task for each `clips_per_task` of them, in order.

    The tasks that read also cut, so that they ask for the CPUs that they are given and nothing waits for more.
    """

    def __init__(self, clips: NumberedClips, part: WorkerPart) -> None:
        super().__init__()
        self.clips, self.part, self.size = clips, part, clips.clips_per_task

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task for each part of the part, whatever `parallelism` is."""
        clips_ref = ray.put((self.clips, self.part))  # once, not in each task: an index may name 250,000 videos
        tasks = []
        for first in range(0, self.part.steps * self.part.batch, self.size):
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(partial(_read_clips, clips_ref, first, self.size), metadata))
        return tasks

    def estimate_inmemory_data_size(self) -> int | None:
        return None


def _read_clips(clips_ref: ray.ObjectRef, first: int, count: int) -> list[Block]:
    cv2.setNumThreads(1)
    clips, part = ray.get(clips_ref)
    return [BlockAccessor.batch_to_block(cut_clips(clips, part.numbers(first, count)))]


def cut_clips(clips: NumberedClips, numbers: Iterable[int]) -> dict[str, npt.NDArray]:
    """The clips of these numbers, by column; those that cannot be decoded with weight 0."""
    return stack_clips(clips.cut_all(numbers), clips.empty())


def stack_clips(clips: list[Clip], empty: Mapping[str, npt.NDArray]) -> dict[str, npt.NDArray]:
    """Clips by column; those without streams get the frames of another one (empty ones where none has any).

    A copy rather than black frames, because batch norm sees the clips of weight 0 as well.
    """
    whole = next((clip for clip in clips if clip["weight"]), empty)
    filled = [clip if clip["weight"] else clip | {stream: whole[stream] for stream in empty} for clip in clips]
    columns = {name: np.array([clip[name] for clip in filled]) for name in ("number", "label", "error")}
    columns["weight"] = np.array([clip["weight"] for clip in filled], np.float32)
    return columns | {stream: np.stack([clip[stream] for clip in filled]) for stream in empty}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The clips of one worker in one step, on the CPU: streams (B, …, T, S, S, C) as they were cut."""

    streams: Mapping[str, Tensor]
    labels: Tensor  # (B,) int64
    weights: Tensor  # (B,) float32, 0 for a clip that could not be decoded
    errors: tuple[str, ...]
    numbers: tuple[int, ...]
    scale: FlowScale | None = None  # of flow in codes; None: in pixels

    def inputs(self, device: torch.device, bound: float) -> dict[str, Tensor]:
        """What the model takes: (B, …, C, T, S, S) float32 in [-1, 1] on the device; `bound` of flow in pixels."""
        moved = {stream: cuda.upload(clips, device) for stream, clips in self.streams.items()}
        return {stream: scale_clips(stream, clips, bound, self.scale) for stream, clips in moved.items()}


def stream_batches(clips: NumberedClips, part: WorkerPart, *, num_cpus: float) -> Iterator[Batch]:
    """This worker's batches, one a step, decoded ahead by Ray Data on `num_cpus` CPUs of the cluster.

    Where `num_cpus` is less than 2, one task decodes at a time.

    Raises ConventionError where the shards' flow is of no convention that this version knows, OutageError where the
    data set cannot be reached.
    """
    if "flow" in clips.input_spec.train.streams:
        check_convention(clips.videos.convention.flow)
    steps_at_once = max(1, SEGMENT_TASKS * clips.clips_per_task // part.batch)
    for done in range(0, part.steps, steps_at_once):
        segment = part.after(done, min(steps_at_once, part.steps - done))
        dataset = build_graph(clips, segment, num_cpus=num_cpus)
        try:
            for columns in dataset.iter_batches(batch_size=part.batch, batch_format="numpy", prefetch_batches=2):
                yield _to_batch(columns, clips)
        except OutageError as error:  # Ray's is one too, with a traceback before the message and advice after it
            raise OutageError(str(getattr(error, "cause", error)).partition("\n")[0]) from None


def build_graph(clips: NumberedClips, part: WorkerPart, *, num_cpus: float) -> ray.data.Dataset:
    """The lazy graph whose rows are the part's clips in order."""
    num_tasks = -(-part.steps * part.batch // clips.clips_per_task)
    tasks_at_once = max(1, int(num_cpus))
    graph = ray.data.read_datasource(
        ClipSource(clips, part),
        override_num_blocks=num_tasks,
        num_cpus=math.floor(min(1.0, num_cpus) * 1000) / 1000,  # rounded up, the last worker's would find no place
        concurrency=tasks_at_once,
        ray_remote_args={"max_retries": MAX_WORKER_DEATHS},
    )
    options = graph.context.execution_options
    options.preserve_order = True
    ahead = TASKS_AHEAD * tasks_at_once * TASK_BYTES + UNMEASURED_BYTES
    options.resource_limits = ExecutionResources(object_store_memory=ahead)
    quieten(graph.context)
    return graph


def _to_batch(columns: Mapping[str, npt.NDArray], clips: NumberedClips) -> Batch:
    return Batch(
        streams={stream: _as_tensor(columns[stream]) for stream in clips.input_spec.train.streams},
        labels=torch.tensor(columns["label"], dtype=torch.int64),
        weights=torch.tensor(columns["weight"]),
        errors=tuple(str(error) for error in columns["error"] if error),
        numbers=tuple(columns["number"].tolist()),
        scale=clips.scale,
    )


def _as_tensor(frames: npt.NDArray) -> Tensor:
    # A copy: Ray's arrays are views of the object store, which tensors may not write to. Codes have ten bits at most,
    # and torch does little with uint16.
    return torch.from_numpy(frames.copy().view(np.int16 if frames.dtype == np.uint16 else frames.dtype))
