"""Which frames, and which part of them, a network takes: decoded frames (T, H, W, C) as numpy arrays in and out.

What is cut follows from a model's input spec; how frames are resized and flow is scaled is settings that a checkpoint
carries, so that a test cuts what training saw. Training clips are cut in `pipelines.clips.augmentation`; what is cut
becomes the network's tensors in `pipelines.clips.tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from tyro import conf

from models.input_spec import FRAMES_PER_SECOND, InputSpec
from pipelines.datasets.records import FrameSampling
from pipelines.errors import ConventionError, SettingsError
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings, FrameRate

Frames = npt.NDArray[np.uint8]  # (T, H, W, 3) RGB
Flow = npt.NDArray[np.floating]  # (T, H, W, 2), px
Array = TypeVar("Array", bound=npt.NDArray[Any])
Resize = Literal["shorter", "square"]
ProtocolName = Literal["paper", "10-clips", "10x3"]

FLOW_BOUND = 20.0  # px: the paper's, and that of all released weights
SAME_SIDE = 1  # px that frames may be larger than wanted without being resized: stored sides are even


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """How decoded frames become clips, in training as at test; flow vectors are scaled along with their frames.

    `short_side`: the shorter side in pixels at which flow was computed; None: that of the model's input spec.
    `frame_size`, WIDTHxHEIGHT, where all frames were of one size, and `fps`, where they were not taken at the input
    spec's rate: how raw videos are to be decoded, too.
    """

    resize: Resize = "shorter"
    """Before the crop: shorter keeps the aspect ratio (the paper's), square squashes the whole frame."""
    flow_bound: float | None = None
    """Pixels of flow, after resizing, that become 1. None: the bound of the shards, 20 in the paper."""
    short_side: Annotated[int | None, conf.Suppress] = None
    frame_size: Annotated[str | None, conf.Suppress] = None
    fps: Annotated[FrameRate | None, conf.Suppress] = None

    @property
    def bound(self) -> float:
        """Pixels that flow is clipped to and that become 1: what is set, else the paper's."""
        return FLOW_BOUND if self.flow_bound is None else self.flow_bound

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf"):
            raise SettingsError(f"--flow-bound is {self.flow_bound}: give a positive number of pixels")

    def to_json(self) -> dict[str, object]:
        """What a checkpoint says of them; rate and size of frames only where they are not the usual ones."""
        unusual = {name: value for name in ("frame_size", "fps") if (value := getattr(self, name)) is not None}
        usual = {"resize": self.resize, "flow_bound": self.bound, "short_side": self.short_side}
        return usual | unusual

    def of_frames(self, sampling: FrameSampling) -> ClipSettings:
        """The same for frames that were taken so."""
        fps = None if sampling.fps == FRAMES_PER_SECOND else sampling.fps
        return replace(self, short_side=sampling.short_side, frame_size=sampling.frame_size, fps=fps)


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """What of a video is tested: its scores are the mean over all clips.

    `num_clips` clips of the training length are spread evenly over the whole video; None: the clips of the model's own
    test, which is the paper's. `num_crops`: the centre, or three along the longer side. `flip`: each also mirrored.
    """

    num_clips: int | None = None
    num_crops: Literal[1, 3] = 1
    flip: bool = False


PROTOCOLS: dict[ProtocolName, EvaluationProtocol] = {
    "paper": EvaluationProtocol(),
    "10-clips": EvaluationProtocol(num_clips=10),
    "10x3": EvaluationProtocol(num_clips=10, num_crops=3),
}


def centre_crop(frames: npt.NDArray, size: int) -> npt.NDArray:
    """The central `size` × `size` pixels of (T, H, W, C) frames, as a view.

    An odd margin leaves its extra pixel below or to the right. Raises ValueError where a side is shorter than `size`.
    """
    return _crops(frames, size, 1)[0]


def _crops(frames: npt.NDArray, size: int, count: int) -> list[npt.NDArray]:
    """The central crop, or three along the longer side: its two ends and the centre between them."""
    height, width = frames.shape[1:3]
    if min(height, width) < size:
        raise ValueError(f"The frames are {width}×{height} px, the crop is {size}×{size}; resize them first.")
    places = [(height - size) // 2] * 3, [(width - size) // 2] * 3
    along, margin = (places[1], width - size) if width >= height else (places[0], height - size)
    along[0], along[2] = 0, margin
    chosen = range(3) if count == 3 else [1]
    return [frames[:, places[0][i] : places[0][i] + size, places[1][i] : places[1][i] + size] for i in chosen]


def needs_resize(height: int, width: int, input_spec: InputSpec, settings: ClipSettings) -> bool:
    """Whether frames of this size in pixels are not what the model's crop is taken from."""
    if settings.resize == "square":
        return height != input_spec.shorter_side or width != input_spec.shorter_side
    return not 0 <= min(height, width) - input_spec.shorter_side <= SAME_SIDE


def resize_for_crop(frames: Array, input_spec: InputSpec, settings: ClipSettings) -> Array:
    """(T, H, W, C) frames at the size that the model's crop is taken from, flow's vectors scaled along."""
    height, width = frames.shape[1:3]
    side, shorter = input_spec.shorter_side, min(height, width)
    if not needs_resize(height, width, input_spec, settings):
        return frames
    if settings.resize == "square":
        return resize_frames(frames, (side, side))
    return resize_frames(frames, (round(height * side / shorter), round(width * side / shorter)))


def resize_frames(frames: Array, shape: tuple[int, int]) -> Array:
    """(T, H, W, C) frames at another height and width; flow, told by its two channels, has its vectors scaled along."""
    height, width = frames.shape[1:3]
    if (height, width) == shape:
        return frames
    shrinking = shape[0] < height or shape[1] < width
    # INTER_LINEAR looks at four pixels, however many become one: it would alias.
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    resized = np.stack([cv2.resize(frame, shape[::-1], interpolation=method) for frame in frames])
    if frames.shape[3] == 2:
        resized *= np.array([shape[1] / width, shape[0] / height], resized.dtype)
    return resized  # type: ignore[return-value]


def flip_frames(frames: Array) -> Array:
    """(T, H, W, C) frames mirrored left to right; what moved right moves left, so flow has its u negated."""
    mirrored = frames[:, :, ::-1]
    if frames.shape[3] == 2:
        mirrored = mirrored * np.array([-1, 1], frames.dtype)
    return mirrored  # type: ignore[return-value]


def settings_of(clips: Mapping[str, Any], convention: Mapping[str, object] | None) -> ClipSettings:
    """The settings that a checkpoint carries; where it says nothing, the paper's, with the convention's flow bound.

    Raises ConventionError where the flow's direction or unit differ from `pipelines.tvl1`, or its bound is no
    positive number.
    """
    bound = flow_bound(convention)
    return ClipSettings(**clips) if clips else ClipSettings(flow_bound=bound)


def flow_bound(convention: Mapping[str, object] | None) -> float:
    """Pixels that a model's flow was clipped to, from the convention in its checkpoint; ±20 where that says nothing.

    Raises ConventionError where direction or unit differ from `pipelines.tvl1`, or the bound is no positive number.
    """
    if convention is None:
        return FLOW_BOUND
    ours = CodecSettings().flow_convention()
    for name in ("direction", "unit"):
        if convention.get(name) != ours[name]:
            raise ConventionError(
                f"The model's flow has the {name} {convention.get(name)!r}; computed here is {ours[name]!r}: "
                "train on flow extracted by this version."
            )
    bound = convention.get("bound_px")
    if not isinstance(bound, int | float) or not 0 < bound < float("inf"):
        raise ConventionError(f"The model's flow has bound_px {bound!r}; it must be a positive number of pixels.")
    return float(bound)


def decoded_side(input_spec: InputSpec, settings: ClipSettings) -> int:
    """Shorter side in pixels to decode a raw video at: where flow was computed, else the input spec's, made even."""
    return settings.short_side or input_spec.shorter_side + input_spec.shorter_side % 2


def decoding_of(input_spec: InputSpec, settings: ClipSettings) -> DecodeSettings:
    """How to decode a raw video: at the rate and size of the frames that the network was trained on."""
    return DecodeSettings(
        fps=settings.fps or float(FRAMES_PER_SECOND),
        short_side=decoded_side(input_spec, settings),
        frame_size=settings.frame_size,
    )


def count_test_frames(input_spec: InputSpec) -> int:
    """Frames from a video's first on that the clips of the model's own test are cut from."""
    return input_spec.test.num_clips * input_spec.test.span


def cut_test_frames(
    video: Mapping[str, npt.NDArray],
    input_spec: InputSpec,
    settings: ClipSettings,
    protocol: EvaluationProtocol = PROTOCOLS["paper"],
) -> dict[str, npt.NDArray]:
    """The frames of a video's test clips, (N, T, size, size, C) for each stream that the input spec names.

    `video` is RGB frames and flow in pixels by stream name, of which flow has one frame fewer. By the paper's protocol
    the clips follow one another from the first frame on. A short stream is looped, to the length of a training clip
    where the model takes a whole video of any length, else to all that the clips span. N counts clips, then crops,
    then mirrored after plain.
    Raises ValueError where a stream is missing, has no frame, or is smaller than the crop.
    """
    if absent := input_spec.test.streams.keys() - video.keys():
        raise ValueError(f"The video comes with {sorted(video)}; the model also needs {sorted(absent)}.")
    # Flow has one frame fewer, and the streams are to show the same frames.
    length = min(len(video[stream]) for stream in input_spec.test.streams)
    cut = {}
    for stream, indices in _test_indices(length, input_spec, protocol).items():
        # Only the frames that are used are resized, each once.
        used, places = np.unique(np.concatenate(indices), return_inverse=True)
        resized = resize_for_crop(video[stream][used], input_spec, settings)
        crops = [
            _crops(resized[chosen], input_spec.size, protocol.num_crops) for chosen in np.split(places, len(indices))
        ]
        plain = [crop for clip in crops for crop in clip]
        both = [view for crop in plain for view in ((crop, flip_frames(crop)) if protocol.flip else (crop,))]
        cut[stream] = np.stack(both)
    return cut


def spread_clips(length: int, input_spec: InputSpec, num_clips: int) -> list[int]:
    """The first frames of that many clips of the training length, evenly spread over a video of `length` frames."""
    last = max(0, length - input_spec.train.span)
    # A single clip is the middle one; linspace would give the first.
    places = np.linspace(0, last, num_clips) if num_clips > 1 else np.array([last / 2])
    return [int(place) for place in np.rint(places)]


def _test_indices(
    length: int, input_spec: InputSpec, protocol: EvaluationProtocol
) -> dict[str, list[npt.NDArray[np.int64]]]:
    """For each stream and clip the indices of its frames, those of a short video looped alike in all streams."""
    if length == 0:
        raise ValueError("The video has no frame to make a clip of; flow needs videos of at least two frames.")
    if protocol.num_clips:
        sampling = input_spec.train
        starts = spread_clips(length, input_spec, protocol.num_clips)
    else:
        sampling = input_spec.test
        starts = [index * sampling.span for index in range(sampling.num_clips)]
    indices = {
        name: [np.array(stream.frame_indices(start)) for start in starts] for name, stream in sampling.streams.items()
    }
    if sampling.any_length:
        # No shorter than what training saw: up to that a short video is looped.
        end = max(length, input_spec.train.span)
        indices = {name: [clip[clip < end] for clip in clips] for name, clips in indices.items()}
    return {name: [clip % length for clip in clips] for name, clips in indices.items()}
