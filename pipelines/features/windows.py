"""Which frames of a video each window holds, and when it begins and ends; the same for all streams of a video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.features.settings import FeatureSettings, Pad

NOTHING = -1  # in place of a frame: zeros


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of `window` frames, every `frame_step`-th, that begin, or with zeros are centred, every `stride` frames.

    Windows are counted from 0. A video's length is that of all its streams, in frames; see `FeatureSettings.flow_end`.
    """

    window: int
    stride: int
    frame_step: int
    pad: Pad

    @classmethod
    def of(cls, settings: FeatureSettings, frame_step: int) -> Windows:
        """The windows of settings, for networks that keep one of every `frame_step` frames."""
        return cls(window=settings.window, stride=settings.stride, frame_step=frame_step, pad=settings.pad)

    @property
    def span(self) -> int:
        """Frames of the video that a window covers."""
        return self.window * self.frame_step

    def first(self, place: int) -> int:
        """The first frame of a window; below 0 where it begins before the video."""
        before = self.window // 2 * self.frame_step if self.pad == "zeros" else 0
        return place * self.stride - before

    def stop(self, place: int) -> int:
        """The frame after a window's last one."""
        return self.first(place) + self.span

    def count(self, length: int) -> int:
        """Windows of a video of `length` frames; 0 where it is too short for one and may not be looped."""
        if length == 0:
            return 0
        begun = -(-length // self.stride)  # windows whose first frame is in the video
        if self.pad == "zeros":  # there it is the middle one
            return begun
        if self.pad == "repeat":
            # No window after the one that shows the last frame.
            return max(1, min(begun, 1 + -(-(length - self.span) // self.stride)))
        whole = max(0, (length - self.span) // self.stride + 1)
        return max(1, whole) if self.pad == "loop" else whole

    def frames(self, place: int, length: int) -> npt.NDArray[np.int64]:
        """The frames of a window in a video of `length` frames, (window,) indices; NOTHING where it sees zeros."""
        frames = self.first(place) + np.arange(self.window) * self.frame_step
        if self.pad == "zeros":
            return np.where((frames >= 0) & (frames < length), frames, NOTHING)
        return np.minimum(frames, length - 1) if self.pad == "repeat" else frames % length

    def times(self, length: int, fps: float) -> npt.NDArray[np.float64]:
        """When each window begins and ends, (windows, 2) in seconds; never outside of the video."""
        first = self.first(0) + self.stride * np.arange(self.count(length), dtype=np.float64)
        return np.clip(np.stack([first, first + self.span], axis=1), 0, length) / fps


def count_frames(settings: FeatureSettings, num_frames: int) -> int:
    """The frames that all streams of a video of `num_frames` have: its length for windows."""
    return max(0, num_frames - 1) if settings.flow_end == "shorten" else num_frames
