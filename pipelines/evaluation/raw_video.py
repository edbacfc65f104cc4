"""A raw video file as the frames and the flow that networks see, without shards in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from pipelines import storage, tvl1
from pipelines.clips.sampling import Frames
from pipelines.media.decode import MAX_LIMIT, DecodeSettings
from pipelines.media.decoder_process import process_decoder


@dataclass(frozen=True, kw_only=True)
class RawVideo:
    """Decoded frames (T, H, W, 3) uint8 RGB, `fps` of them a second."""

    frames: Frames
    fps: float


def read_video(uri: str, settings: DecodeSettings, *, most: Callable[[float], int] | None = None) -> RawVideo:
    """The frames of a video; `most` says how many from the first on, given the frames a second. None: all.

    Raises OSError where the file cannot be fetched, VideoError where it cannot be decoded, or takes its decoder more
    than the settings allow.
    """
    span: dict[str, float | None] = {}
    if most is not None:
        # The rest of a long video must cost nothing. Where the rate is the file's own, it is known with the frames.
        end = None if settings.fps == "native" else most(settings.fps) / settings.fps
        settings, span = replace(settings, max_frames=MAX_LIMIT), {"start": 0.0, "end": end}
    taken: list[npt.NDArray[np.uint8]] = []
    with storage.local_copy(uri) as path:
        frames = process_decoder(settings).frames(path, **span)
        for frame in frames:
            taken.append(frame)
            assert frames.expected_fps is not None, "it comes before the first frame"
            if most is not None and len(taken) == most(frames.expected_fps):
                break
        frames.close()
    return RawVideo(frames=np.stack(taken), fps=frames.expected_fps or 0.0)


def compute_flow(frames: Frames, preset: str) -> npt.NDArray[np.float32]:
    """TV-L1 flow in pixels, (T-1, H, W, 2), of RGB frames, as the extraction computes it."""
    # OpenCV's grey, as in the extraction: a network sees the flow that it was trained on.
    return tvl1.flow(np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]), preset=preset)
