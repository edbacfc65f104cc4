"""A raw video file as the frames and the flow that networks see, without shards in between."""

from __future__ import annotations

from itertools import islice

import cv2
import numpy as np
import numpy.typing as npt

from models.input_spec import FRAMES_PER_SECOND
from pipelines import storage, tvl1
from pipelines.clips.sampling import Frames
from pipelines.media.decode import DecodeSettings
from pipelines.media.decoder_process import process_decoder


def decode_frames(
    uri: str, *, short_side: int, num_frames: int | None = None, cpu_limit_s: int | None = DecodeSettings.cpu_limit_s
) -> Frames:
    """The frames (T, H, W, 3) uint8 RGB of a video at 25 frames a second, the first `num_frames` where that is given.

    Raises OSError where the file cannot be fetched, VideoError where it cannot be decoded, or takes its decoder more
    than `cpu_limit_s` seconds of a processor.
    """
    settings = DecodeSettings(fps=FRAMES_PER_SECOND, short_side=short_side, cpu_limit_s=cpu_limit_s)
    end = None if num_frames is None else num_frames / FRAMES_PER_SECOND
    with storage.local_copy(uri) as path:
        frames = process_decoder(settings).frames(path, start=0 if end else None, end=end)
        return np.stack(list(islice(frames, num_frames)))


def compute_flow(frames: Frames, preset: str) -> npt.NDArray[np.float32]:
    """TV-L1 flow in pixels, (T-1, H, W, 2), of RGB frames, as the extraction computes it."""
    # OpenCV's grey, as in the extraction: a network sees the flow that it was trained on.
    return tvl1.flow(np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]), preset=preset)
