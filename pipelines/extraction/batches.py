"""Frames in batches of bounded size, for flow between neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Frames: TypeAlias = npt.NDArray[np.uint8]
BATCH_PIXELS = 64 * 340 * 256  # 64 frames of 4:3 at a shorter side of 256
MOST_PAIRS = 256


def iter_batches(frames: Iterable[Frames], batch_pixels: int) -> Iterator[Frames]:
    """Batches (n + 1, H, W) of frames, each beginning with the last frame of the one before."""
    batch: list[Frames] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) > pairs_of(frame.shape[0] * frame.shape[1], batch_pixels):
            yield np.stack(batch)
            batch = [frame]
    if len(batch) > 1:
        yield np.stack(batch)


def pairs_of(frame_pixels: int, batch_pixels: int) -> int:
    """Pairs of frames of a size that make a batch."""
    return max(1, min(MOST_PAIRS, batch_pixels // frame_pixels))
