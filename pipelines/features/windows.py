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

    A video's length is counted in the frames that all streams have; see `FeatureSettings.flow_end`.
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

    def count(self, length: int) -> int:
        """Windows of a video of `length` frames; 0 where it is too short for one and may not be looped."""
        raise NotImplementedError

    def times(self, length: int, fps: float) -> npt.NDArray[np.float64]:
        """When each window begins and ends, (windows, 2) in seconds; never outside of the video."""
        raise NotImplementedError
