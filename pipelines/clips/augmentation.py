"""One training clip of a video: where it begins, what is cropped, whether it is mirrored, and its pixels.

Everything random follows from one generator, so that a clip is known by the run's seed and its place in the run. Both
streams of a clip show the same frames, the same crop and the same side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from models.input_spec import InputSpec
from pipelines.clips.sampling import ClipSettings, Frames, flip_frames, resize_for_crop
from pipelines.errors import SettingsError

# Decodes frames (n, H, W, C) from start to stop (None: the end) of one stream: uint8 RGB, or flow in pixels.
ReadWindow = Callable[[str, int, int | None], npt.NDArray]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training changes at random, each clip as a whole; the crop and the first frame are always drawn."""

    flip: float = 0.5
    """Probability that a clip is mirrored left to right; u is negated with it."""
    jitter: float = 0.0
    """Largest relative change of RGB's brightness, contrast and saturation (the paper: photometric distortion)."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise SettingsError(f"--flip is {self.flip}: give a probability, 0 to 1")
        if not 0 <= self.jitter < 1:
            raise SettingsError(f"--jitter is {self.jitter}: give a share, 0 (none) up to but not 1")


def cut_training_clip(
    read: ReadWindow,
    num_frames: int,
    input_spec: InputSpec,
    settings: ClipSettings,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> dict[str, npt.NDArray]:
    """One clip of each stream that the input spec names: RGB (T, S, S, 3) uint8, flow (T, S, S, 2) float16 in pixels.

    `num_frames` is the video's; flow has one fewer. The first frame is uniform among those that leave enough frames; a
    video that is too short is looped from its first frame (paper, section 2.5). Only that window is read.
    Raises ValueError where the video has no frame of a stream, or decodes to fewer frames than it should have.
    """
    train = input_spec.train
    length = num_frames - 1 if "flow" in train.streams else num_frames
    if length < 1:
        raise ValueError(f"a video of {num_frames} frames gives no clip; flow needs at least two")
    start = int(rng.integers(max(0, length - train.span) + 1))
    window = min(train.span, length)
    # All are drawn, whatever is switched off: a flag changes nothing else of the clips of a seed.
    place, mirrored = rng.random(2), rng.random() < augmentation.flip
    gains = 1 + augmentation.jitter * rng.uniform(-1, 1, 3)
    clips = {}
    for stream, sampling in train.streams.items():
        # Before the strides are taken: a video is decoded frame by frame in any case.
        frames = read(stream, start, start + window)
        if len(frames) != window:
            raise ValueError(f"{len(frames)} of {window} {stream} frames from frame {start} on could be decoded")
        clip = frames[np.array(sampling.frame_indices(0)) % window]
        clip = _crop(resize_for_crop(clip, input_spec, settings), input_spec, place)
        clip = flip_frames(clip) if mirrored else clip
        if stream == "rgb" and augmentation.jitter:
            clip = jitter_colours(clip, *gains)
        # float16 halves what crosses the object store; at 20 px it steps by 1/64 px, less than the stored codes do.
        clips[stream] = np.ascontiguousarray(clip, np.uint8 if stream == "rgb" else np.float16)
    return clips


def _crop(frames: npt.NDArray, input_spec: InputSpec, place: npt.NDArray[np.float64]) -> npt.NDArray:
    """The crop whose upper left corner lies at `place`, shares in [0, 1) of the possible rows and columns."""
    height, width = frames.shape[1:3]
    top, left = (int(share * (side - input_spec.size + 1)) for share, side in zip(place, (height, width), strict=True))
    return frames[:, top : top + input_spec.size, left : left + input_spec.size]


def jitter_colours(frames: Frames, brightness: float, contrast: float, saturation: float) -> Frames:
    """(T, H, W, 3) RGB with three gains, the same for all frames; 1 changes nothing.

    Saturation blends with each pixel's grey value, contrast with the clip's mean grey.
    """
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])[..., None].astype(np.float32)
    changed = grey + saturation * (frames.astype(np.float32) - grey)
    mean = grey.mean()
    changed = brightness * (mean + contrast * (changed - mean))
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def empty_clip(input_spec: InputSpec) -> Mapping[str, npt.NDArray]:
    """Black frames and flow of zeros, of the shapes that `cut_training_clip` gives."""
    size, dtypes = input_spec.size, {"rgb": np.uint8, "flow": np.float16}
    return {
        stream: np.zeros((sampling.num_frames, size, size, sampling.channels), dtypes[stream])
        for stream, sampling in input_spec.train.streams.items()
    }
