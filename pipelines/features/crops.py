"""The 1, 5 or 10 square crops of a frame."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipelines.clips.sampling import flip_frames
from pipelines.media.codec import FlowScale, negate

Crops = Literal[1, 5, 10]
Place = tuple[int, int]  # top and left edge, px


def place_crops(height: int, width: int, size: int, crops: Crops) -> list[Place]:
    """Where the crops that are not mirrored lie: the centre, or the four corners by rows and the centre.

    The order of five is torchvision's. An odd margin leaves its extra pixel below or to the right of the centre.

    Raises ValueError where a side is shorter than `size`.
    """
    if min(height, width) < size:
        raise ValueError(f"the frames are {width}×{height} px, and the crop is {size}×{size}")
    bottom, right = height - size, width - size
    centre = (bottom // 2, right // 2)
    return [centre] if crops == 1 else [(0, 0), (0, right), (bottom, 0), (bottom, right), centre]


def crop_frame(frame: npt.NDArray[Any], size: int, crops: Crops, scale: FlowScale | None = None) -> npt.NDArray[Any]:
    """(crops, size, size, C) of a frame (H, W, C): RGB, flow in pixels, or flow in codes of `scale`.

    First the crops of `place_crops`, then of ten each of them mirrored. Mirrored flow has u negated.
    Raises ValueError where a side is shorter than `size`.
    """
    height, width = frame.shape[:2]
    places = place_crops(height, width, size, crops)
    plain = np.stack([frame[top : top + size, left : left + size] for top, left in places])
    return plain if crops != 10 else np.concatenate([plain, mirror(plain, scale)])


def mirror(frames: npt.NDArray[Any], scale: FlowScale | None = None) -> npt.NDArray[Any]:
    """(N, H, W, C) frames mirrored left to right, of flow with u negated: in pixels, or in codes of `scale`."""
    if scale is None:
        return flip_frames(frames)
    mirrored = frames[:, :, ::-1].copy()
    mirrored[..., 0] = negate(mirrored[..., 0], scale)
    return mirrored
