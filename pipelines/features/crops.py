"""The 1, 5 or 10 square crops of a frame."""

from __future__ import annotations

from typing import Any, Literal

import numpy.typing as npt

from pipelines.media.codec import FlowScale

Crops = Literal[1, 5, 10]


def crop_frame(frame: npt.NDArray[Any], size: int, crops: Crops, scale: FlowScale | None = None) -> npt.NDArray[Any]:
    """(crops, size, size, C) of a frame (H, W, C): RGB, flow in pixels, or flow in codes of `scale`.

    The order is that of `FeatureSettings.crops`. Mirrored flow has u negated.
    Raises ValueError where a side is shorter than `size`.
    """
    raise NotImplementedError
