"""The clips of Fréchet Video Distance: which frames of a video, and how each published dialect makes them an input.

A clip is `frames` pictures in a row at the rate at which they are stored: a generated video has no other. Videos that
are shorter than a clip give none (StyleGAN-V's `discard_short_videos`).
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.clips.sampling import Frames
from pipelines.errors import SettingsError

DialectName = Literal["stylegan-v", "videogpt", "features"]

SIZE = 224  # px, both sides of what I3D sees


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One way in which FVD is computed, as published.

    `shorter_side`: frames are resized to that, in pixels, and the centre is cut out; None: both sides become 224,
    whatever the aspect ratio. Resizing is bilinear between two pixels a side, without anti-aliasing, in all of them.
    `output` is what the network gives for a clip. `unbiased`: covariances are over N - 1, else over N.
    """

    output: Literal["logits", "features"]
    shorter_side: int | None
    unbiased: bool


DIALECTS: dict[DialectName, Dialect] = {
    # universome/stylegan-v (src/metrics/frechet_video_distance.py, fvd2048_16f): i3d_torchscript.pt resizes to 224×224
    # and gives the 400 logits of TF-Hub's deepmind/i3d-kinetics-400/1; covariances over N (metric_utils.py). cd-fvd is
    # the same. google-research/frechet_video_distance (Unterthiner et al. 2018) takes N - 1, as TATS does, and the
    # resizing of TensorFlow 1, whose pixels lie elsewhere.
    "stylegan-v": Dialect(output="logits", shorter_side=None, unbiased=False),
    # wilson1yan/VideoGPT (videogpt/fvd/fvd.py, data.py: preprocess). VideoGPT's own script scales pixels to ±0.5; those
    # who took it over (JunyaoHu/common_metrics_on_video_quality) scale to ±1, which the network is made for, as here.
    "videogpt": Dialect(output="logits", shorter_side=224, unbiased=True),
    # The 1024 numbers before the classifier of the weights that DeepMind released (rgb_imagenet), which are not those
    # of TF-Hub, cropped as in their own test (Carreira and Zisserman 2017, section 3).
    "features": Dialect(output="features", shorter_side=256, unbiased=True),
}


def prepare_clips(clips: Tensor, dialect: Dialect) -> Tensor:
    """What the network sees, (B, 3, T, 224, 224) float32 in [-1, 1], of pixels (B, T, H, W, 3) uint8."""
    num_clips, num_frames, height, width, _ = clips.shape
    pictures = clips.reshape(-1, height, width, 3).permute(0, 3, 1, 2).to(torch.float32)
    resized = interpolate(
        pictures, size=_resized(height, width, dialect), mode="bilinear", align_corners=False, antialias=False
    )
    top, left = (resized.shape[2] - SIZE) // 2, (resized.shape[3] - SIZE) // 2
    cropped = resized[:, :, top : top + SIZE, left : left + SIZE] / 127.5 - 1
    return cropped.reshape(num_clips, num_frames, 3, SIZE, SIZE).movedim(2, 1)


def _resized(height: int, width: int, dialect: Dialect) -> tuple[int, int]:
    side = dialect.shorter_side
    if side is None:
        return SIZE, SIZE
    # In floats, as VideoGPT has it: where rounding makes 224.00000000000003 of a square's side, that is 225.
    longer = math.ceil(max(height, width) * (side / min(height, width)))
    return (side, longer) if height < width else (longer, side)


@dataclass(frozen=True, kw_only=True)
class ClipChoice:
    """Which frames of a video become clips."""

    frames: int = 16
    """Frames of a clip. All published dialects take 16; StyleGAN-V also 128."""
    frame_step: int = 1
    """One of every so many stored frames is taken (StyleGAN-V's subsample8f: 8)."""
    clips_per_video: int = 1
    """Clips of each video. More than one are not independent of each other."""
    begin: Literal["random", "first"] = "random"
    """Where clips begin: anywhere in the video, by --seed, or at its first frame and one after the other."""
    seed: int = 0
    """Seed of the choice of videos and clips."""

    def __post_init__(self) -> None:
        for name in ("frames", "frame_step", "clips_per_video"):
            if getattr(self, name) < 1:
                raise SettingsError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        if self.seed < 0:
            raise SettingsError(f"--seed is {self.seed}: give at least 0")

    @property
    def span(self) -> int:
        """Stored frames from a clip's first to its last."""
        return (self.frames - 1) * self.frame_step + 1

    def generator(self, video: str) -> np.random.Generator:
        """The random numbers of one video: the same whichever others are in the set, and whoever reads it when."""
        return np.random.default_rng([self.seed, *hashlib.sha256(video.encode()).digest()[:8]])

    def starts(self, length: int, video: str) -> list[int]:
        """The first frames of the clips of a video of `length` frames, in order; none where it is too short."""
        if self.begin == "first":
            return list(range(0, length - self.span + 1, self.span))[: self.clips_per_video]
        places = max(0, length - self.span + 1)
        count = min(self.clips_per_video, places)
        return sorted(self.generator(video).choice(places, count, replace=False).tolist()) if count else []

    def select(self, frames: Iterable[npt.NDArray[np.uint8]], video: str) -> tuple[list[Frames], int]:
        """The clips (T, H, W, 3) of a video whose length shows at its end, and the frames that were read.

        Random ones by reservoir sampling: each window is as likely as any other, and only the chosen ones are held.
        """
        rng, read = self.generator(video), 0
        window: deque[npt.NDArray[np.uint8]] = deque(maxlen=self.span)
        chosen: dict[int, tuple[int, list[npt.NDArray[np.uint8]]]] = {}
        for read, frame in enumerate(frames, start=1):
            window.append(frame)
            start = read - self.span
            if start < 0:
                continue
            place = self._place(start, rng)
            if place is not None:
                chosen[place] = (start, list(window)[:: self.frame_step])
            if self.begin == "first" and len(chosen) == self.clips_per_video:
                break
        return [np.stack(clip) for _, clip in sorted(chosen.values(), key=lambda item: item[0])], read

    def _place(self, start: int, rng: np.random.Generator) -> int | None:
        """The place that the window which begins at `start` takes among the chosen ones; None where it takes none."""
        if self.begin == "first":
            return None if start % self.span else start // self.span
        place = start if start < self.clips_per_video else int(rng.integers(start + 1))
        return place if place < self.clips_per_video else None
