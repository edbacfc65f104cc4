"""One training clip of a video: where it begins, what is cropped, whether it is mirrored, and its pixels.

Everything random follows from one generator, so that a clip is known by the run's seed and its place in the run. Both
streams of a clip show the same frames, the same crop and the same side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from models.input_spec import InputSpec
from pipelines.clips.sampling import ClipSettings, Frames, flip_frames, needs_resize, resize_for_crop
from pipelines.errors import SettingsError
from pipelines.formatting import format_count
from pipelines.media.codec import Area, FlowScale, dequantise, quantise

MOST_REPEATS = 64  # a batch of one video


class ReadFrames(Protocol):
    """Decodes frames (n, H, W, C) of one stream by their indices: uint8 RGB; flow in pixels or codes.

    Of an area only, and mirrored, where that is asked for.
    """

    def __call__(self, stream: str, frames: Sequence[int], area: Area | None, *, mirrored: bool) -> npt.NDArray: ...


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training changes at random, each clip as a whole; the crop and the first frame are always drawn."""

    flip: float = 0.5
    """Probability that a clip is mirrored left to right; u is negated with it."""
    jitter: float = 0.0
    """Largest relative change of RGB's brightness, contrast and saturation (the paper: photometric distortion)."""
    repeats: int = 1
    """Clips cut from each decoded window, every one with a crop, side and colours of its own: less decoding for each,
    and batches of fewer videos (repeated augmentation, Hoffer et al. 2020)."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise SettingsError(f"--flip is {self.flip}: give a probability, 0 to 1")
        if not 0 <= self.jitter < 1:
            raise SettingsError(f"--jitter is {self.jitter}: give a share, 0 (none) up to but not 1")
        if not 1 <= self.repeats <= MOST_REPEATS:
            raise SettingsError(f"--repeats is {self.repeats}: give 1 to {MOST_REPEATS} clips of a window")


def cut_training_clip(
    read: ReadFrames,
    shape: tuple[int, int, int],
    input_spec: InputSpec,
    settings: ClipSettings,
    augmentation: Augmentation,
    rng: np.random.Generator,
    *,
    scale: FlowScale | None = None,
    window: np.random.Generator | None = None,
) -> dict[str, npt.NDArray]:
    """One clip of each stream that the input spec names: RGB (T, S, S, 3) uint8, flow (T, S, S, 2).

    `shape` is the video's number of frames, height and width; flow has one frame fewer. Flow is float16 in pixels;
    with a `scale` it is that of codes, which `read` then gives and the clip holds. The first frame is uniform among
    those that leave enough frames, drawn from `window` where that is given; a video that is too short is looped from
    its first frame (paper, section 2.5). Only the frames that the clip shows are read, and only their crop where frames
    need no resizing.
    Raises ValueError where the video has no frame of a stream, or decodes to fewer frames than it should have.
    """
    num_frames, height, width = shape
    train = input_spec.train
    length = num_frames - 1 if "flow" in train.streams else num_frames
    if length < 1:
        raise ValueError(f"a video of {format_count(num_frames, 'frame')} gives no clip; flow needs at least two")
    start = int((window or rng).integers(max(0, length - train.span) + 1))
    shown = min(train.span, length)
    # All are drawn, whatever is switched off: a flag changes nothing else of the clips of a seed.
    place, mirrored = rng.random(2), rng.random() < augmentation.flip
    gains = 1 + augmentation.jitter * rng.uniform(-1, 1, 3)
    resized = needs_resize(height, width, input_spec, settings)
    clips = {}
    for stream, sampling in train.streams.items():
        # In order and once each: a looped video shows frames again.
        wanted, places = np.unique(np.array(sampling.frame_indices(0)) % shown, return_inverse=True)
        area = None if resized else _area(height, width, input_spec, place)
        clip = read(stream, (start + wanted).tolist(), area, mirrored=mirrored and not resized)
        if len(wanted) < len(places):
            clip = clip[places]
        codes = scale if stream == "flow" else None
        if resized:
            pixels = dequantise(clip, codes) if codes else clip
            pixels = _crop(resize_for_crop(pixels, input_spec, settings), input_spec, place)
            pixels = flip_frames(pixels) if mirrored else pixels
            clip = quantise(pixels, codes) if codes else pixels
        if stream == "rgb" and augmentation.jitter:
            clip = jitter_colours(clip, *gains)
        # Of floats float16 halves what crosses the object store; at 20 px it steps by 1/64 px.
        clips[stream] = np.ascontiguousarray(clip, clip.dtype if stream == "rgb" or codes else np.float16)
    return clips


def _crop(frames: npt.NDArray, input_spec: InputSpec, place: npt.NDArray[np.float64]) -> npt.NDArray:
    rows, columns = _area(frames.shape[1], frames.shape[2], input_spec, place).slices
    return frames[:, rows, columns]


def _area(height: int, width: int, input_spec: InputSpec, place: npt.NDArray[np.float64]) -> Area:
    """The crop whose upper left corner lies at `place`, shares in [0, 1) of the possible rows and columns."""
    size = input_spec.size
    top, left = (int(share * (side - size + 1)) for share, side in zip(place, (height, width), strict=True))
    return Area(top=top, left=left, height=size, width=size)


def jitter_colours(frames: Frames, brightness: float, contrast: float, saturation: float) -> Frames:
    """(T, H, W, 3) RGB with three gains, the same for all frames; 1 changes nothing.

    Saturation blends with each pixel's grey value, contrast with the clip's mean grey.
    """
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])[..., None].astype(np.float32)
    changed = grey + saturation * (frames.astype(np.float32) - grey)
    mean = grey.mean()
    changed = brightness * (mean + contrast * (changed - mean))
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def empty_clip(input_spec: InputSpec, scale: FlowScale | None = None) -> Mapping[str, npt.NDArray]:
    """Black frames and flow of zeros, of the shapes and dtypes that `cut_training_clip` gives."""
    size, flow = input_spec.size, np.dtype(scale.dtype if scale else np.float16)
    contents = {"rgb": np.uint8(0), "flow": flow.type(round(scale.zero_code) if scale else 0)}
    return {
        stream: np.full((sampling.num_frames, size, size, sampling.channels), contents[stream])
        for stream, sampling in input_spec.train.streams.items()
    }
