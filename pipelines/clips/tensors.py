"""What was cut as the clips that a network takes: float32 tensors (C, T, H, W) in [-1, 1].

RGB is spread over its 256 values, flow clipped to a bound, u before v.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.input_spec import InputSpec
from pipelines.clips.sampling import (
    FLOW_BOUND,
    PROTOCOLS,
    ClipSettings,
    EvaluationProtocol,
    Flow,
    Frames,
    cut_test_frames,
)
from pipelines.media.codec import FlowScale


def rgb_clip(frames: Frames) -> Tensor:
    """(T, H, W, 3) uint8 RGB as (3, T, H, W) float32 in [-1, 1]: x / 127.5 - 1.

    Raises ValueError for another dtype or number of channels.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"RGB frames are uint8 of shape (T, H, W, 3); got {frames.dtype} of shape {frames.shape}.")
    return scale_clips("rgb", _as_tensor(frames)).contiguous()


def flow_clip(flow: Flow, bound: float = FLOW_BOUND) -> Tensor:
    """(T, H, W, 2) flow in pixels as (2, T, H, W) float32 in [-1, 1]: clipped to ± `bound` pixels, u before v.

    Raises ValueError for integers, which are codes and not pixels, and for another number of channels.
    """
    if flow.ndim != 4 or flow.shape[3] != 2 or not np.issubdtype(flow.dtype, np.floating):
        raise ValueError(f"Flow is floats of shape (T, H, W, 2), in pixels; got {flow.dtype} of shape {flow.shape}.")
    return scale_clips("flow", _as_tensor(flow), bound).contiguous()


def _as_tensor(frames: npt.NDArray) -> Tensor:
    return torch.from_numpy(np.array(frames, order="C"))  # torch warns of views that may not be written to


def scale_clips(stream: str, clips: Tensor, bound: float = FLOW_BOUND, scale: FlowScale | None = None) -> Tensor:
    """Clips (…, T, H, W, C) of uint8 RGB or of flow as float32 (…, C, T, H, W) in [-1, 1].

    Flow is in pixels, or in codes of `scale`. The channels stay innermost in memory (channels_last_3d), which is what
    the networks compute with.
    """
    # A copy, for the steps below work in place and the frames are the caller's.
    scaled = clips.to(torch.float32, copy=True)
    if stream == "rgb":
        return scaled.div_(127.5).sub_(1).movedim(-1, -4)
    if scale is not None:  # lossy codecs overshoot the bound
        scaled.sub_(scale.zero_code).mul_(scale.step).clamp_(-scale.bound, scale.bound)
    return scaled.div_(bound).clamp_(-1, 1).movedim(-1, -4)


def cut_test_clips(
    video: Mapping[str, npt.NDArray],
    input_spec: InputSpec,
    settings: ClipSettings,
    protocol: EvaluationProtocol = PROTOCOLS["paper"],
) -> dict[str, Tensor]:
    """The test clips of a video as the model takes them, (N, C, T, size, size); see `cut_test_frames`."""
    cut = cut_test_frames(video, input_spec, settings, protocol)
    return {
        stream: torch.stack([rgb_clip(clip) if stream == "rgb" else flow_clip(clip, settings.bound) for clip in clips])
        for stream, clips in cut.items()
    }
