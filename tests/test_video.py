"""Frames at a fixed rate from real files: made here with PyAV, and the ones other projects test their decoders with."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    *,
    frames: int = 50,
    size: tuple[int, int] = (96, 64),
    rate: int = 25,
    codec: str = "libx264",
    **options: str,
) -> Path:
    """A bar that wanders and a brightness that rises with time; size is (width, height)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(index, size))))
        container.mux(stream.encode())
    return path


def bars(index: int, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    picture = np.full((height, width, 3), index % 250, np.uint8)
    picture[:, index % width] = 255
    return picture
