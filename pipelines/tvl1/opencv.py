"""OpenCV's DualTVL1 behind the same door: the reference that the other backends are measured against."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import cv2
import numpy as np

from pipelines.errors import BackendError
from pipelines.tvl1.params import TVL1Params

# What each preset is compared with, as OpenCV's setters name it; "faithful" is OpenCV when nobody sets anything.
PRESET_SETTINGS: dict[str, dict[str, float]] = {
    "faithful": {},
    "quality": {"ScalesNumber": 10},
    "fast": {"ScalesNumber": 10, "WarpingsNumber": 2, "OuterIterations": 1, "InnerIterations": 15},
}


def settings_of(params: TVL1Params) -> dict[str, float]:
    """`params` as OpenCV's setters name them; its early stop follows another rule and keeps OpenCV's default."""
    return {
        "Tau": params.tau,
        "Lambda": params.lambda_,
        "Theta": params.theta,
        "ScalesNumber": params.num_scales,
        "ScaleStep": params.scale_step,
        "WarpingsNumber": params.num_warps,
        "InnerIterations": params.num_iterations,
        "OuterIterations": 1,
        "MedianFiltering": params.median,
    }


def iter_flow(frames: Iterator[np.ndarray], settings: dict[str, float]) -> Iterator[np.ndarray]:
    """Flow (H, W, 2) float32 of each frame (H, W) uint8 to the next, by OpenCV's DualTVL1OpticalFlow."""
    require_contrib()
    solver = cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
    for name, value in settings.items():
        getattr(solver, f"set{name}")(value)
    for first, second in pairwise(frames):
        yield solver.calc(first, second, None)


def require_contrib() -> None:
    """Raise BackendError where the OpenCV at hand has no TV-L1."""
    if not hasattr(cv2, "optflow"):
        raise BackendError(
            f"OpenCV {cv2.__version__} of this environment has no TV-L1, which only the contrib distributions have: "
            "take another flow backend, or replace it by opencv-contrib-python-headless"
        )


def describe_target() -> str:
    """Which OpenCV computes the flow."""
    require_contrib()
    return f"opencv {cv2.__version__}"
