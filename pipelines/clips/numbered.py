"""Clips known by their numbers, and how the clip of a number is cut: what a process that decodes needs, without torch.

Number p of a run is a video of a random order that is drawn anew for each epoch from the seed, with a window, crop and
mirroring drawn from the seed and p; where windows are shared (`Augmentation.repeats`), so many numbers in a row have
one video and window, not one crop. A clip that cannot be decoded is replaced by another of its task with weight 0, and
told; where storage is away, that is an error instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from models.input_spec import InputSpec
from pipelines import storage
from pipelines.clips.augmentation import Augmentation, cut_training_clip, empty_clip
from pipelines.clips.sampling import ClipSettings, EvaluationProtocol, cut_test_frames, flip_frames, needs_resize
from pipelines.datasets import shards
from pipelines.datasets.records import DATASET
from pipelines.datasets.video_index import VideoIndex
from pipelines.errors import OutageError
from pipelines.media.codec import (
    DECODING_ERRORS,
    Area,
    FlowScale,
    decode_code_frames,
    decode_flow,
    decode_rgb,
    decode_rgb_frames,
    dequantise,
    negate,
    scale_of,
)

TASK_BYTES = 128 << 20  # of the clips that one task cuts: enough work to hide Ray's overhead, little enough to hold
MAX_TASK_CLIPS = 64

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

    def clips_per_task(self, batch: int) -> int:
        """Clips that one task cuts, by their size: whole batches, which then need no copying together, or a part."""
        num_bytes = sum(clip.nbytes for clip in self.empty().values())
        most = max(1, min(MAX_TASK_CLIPS, TASK_BYTES // num_bytes))
        return most // batch * batch or max(count for count in range(1, most + 1) if batch % count == 0)

    @property
    def scale(self) -> FlowScale | None:
        """How the flow of clips is coded; None where they hold pixels, or no flow."""
        return None

    def try_video(self, number: int, place: int, cut: Callable[[Clip, Clip], Clip], read: ReadRow) -> Clip:
        """What `cut` makes of the video at a place of the index, given its row there and that in its shard.

        A video that cannot be decoded gives a clip without streams, of weight 0, with the reason as `error`. Raises
        OutageError where the fault is not the video's.
        """
        video = self.videos.row(place)
        clip = {"number": number, "label": video["label"], "weight": 1.0, "error": ""}
        for again in (True, False):
            try:
                return clip | cut(video, read(video, list(self.input_spec.train.streams)))
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

    def clips_per_task(self, batch: int) -> int:
        repeats = self.augmentation.repeats
        return max(1, super().clips_per_task(batch) // repeats) * repeats  # no window is decoded by two tasks

    @property
    def scale(self) -> FlowScale | None:
        side = self.videos.sampling.shorter_side
        resized = self.settings.resize == "square" or needs_resize(side, side, self.input_spec, self.settings)
        # Flow that is resized is no longer made of codes.
        if resized or "flow" not in self.input_spec.train.streams:
            return None
        return scale_of(self.videos.convention.flow)

    def cut(self, number: int) -> Clip:
        return self.cut_all([number])[0]

    def cut_all(self, numbers: Iterable[int]) -> list[Clip]:
        repeats, clips = self.augmentation.repeats, []
        for _, together in groupby(numbers, lambda number: number // repeats):
            window = _Window() if repeats > 1 else None
            clips += [self._cut(number, window) for number in together]
        return clips

    def _cut(self, number: int, window: _Window | None) -> Clip:
        """Clip `number`, of a window that holds what clips of the same one have read."""
        scale, repeats = self.scale, self.augmentation.repeats
        read_row, read_frames = (window.read_row, window.read_frames) if window else (read_stored, _read_frames)

        def cut(video: Clip, row: Clip) -> Clip:
            read = partial(read_frames, row, in_codes=scale is not None)
            # A generator for each clip: it is the same whichever task and worker cuts it, and after any resume.
            rng = np.random.default_rng([self.seed, number])
            shared = np.random.default_rng([self.seed, number // repeats, repeats]) if window else None
            shape = video["num_frames"], video["height"], video["width"]
            spec, settings, augmentation = self.input_spec, self.settings, self.augmentation
            return cut_training_clip(read, shape, spec, settings, augmentation, rng, scale=scale, window=shared)

        return self.try_video(number, self.video_of(number), cut, read_row)

    def empty(self) -> Mapping[str, npt.NDArray]:
        return empty_clip(self.input_spec, self.scale)


class _Window:
    """What clips of one window have in common: the video's row, and the window's frames."""

    def __init__(self) -> None:
        self.row: Clip | None = None
        self.frames: dict[str, npt.NDArray] = {}  # by stream

    def read_row(self, video: Mapping[str, Any], streams: list[str]) -> Clip:
        """As `read_stored`, once."""
        if self.row is None:
            self.row = read_stored(video, streams)
        return self.row

    def read_frames(
        self, row: Clip, stream: str, frames: Sequence[int], area: Area | None, *, mirrored: bool, in_codes: bool
    ) -> npt.NDArray:
        """As `_read_frames`; whole frames are decoded, once, and each clip has its part of them."""
        if stream not in self.frames:
            self.frames[stream] = _read_frames(row, stream, frames, None, mirrored=False, in_codes=in_codes)
        found = self.frames[stream]
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
    codes = decode_code_frames(row["flow"], convention, frames, area, mirrored=mirrored)
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
            read_stored,
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
