"""Frames and flow as the clips that a network takes.

Decoded frames come in as numpy arrays (T, H, W, C), clips go out as float32 tensors (C, T, H, W) in [-1, 1]: RGB spread
over its 256 values, flow clipped to a bound, u before v. What is cut follows from a model's contract.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.contract import ClipSampling, InputContract, StreamSampling
from pipelines.codec import CodecSettings, ConventionError

Frames = npt.NDArray[np.uint8]  # (T, H, W, 3) RGB
Flow = npt.NDArray[np.float32]  # (T, H, W, 2), px

FLOW_BOUND = 20.0  # px: the paper's, and that of all released weights


def centre_crop(frames: npt.NDArray, size: int) -> npt.NDArray:
    """The central `size` × `size` pixels of (T, H, W, C) frames, as a view.

    An odd margin leaves its extra pixel below or to the right. Raises ValueError where a side is shorter than `size`.
    """
    height, width = frames.shape[1:3]
    if min(height, width) < size:
        raise ValueError(f"The frames are {width}×{height} px, the crop is {size}×{size}; resize them first.")
    top, left = (height - size) // 2, (width - size) // 2
    return frames[:, top : top + size, left : left + size]


def loop_to(frames: npt.NDArray, num_frames: int) -> npt.NDArray:
    """The first `num_frames` of the frames, which begin anew where they are too few (paper, section 2.5).

    Raises ValueError where there is no frame at all.
    """
    if len(frames) == 0:
        raise ValueError(f"There is no frame to make {num_frames} of; flow needs videos of at least two frames.")
    return frames[:num_frames] if len(frames) >= num_frames else frames[np.arange(num_frames) % len(frames)]


def rgb_clip(frames: Frames) -> Tensor:
    """(T, H, W, 3) uint8 RGB as (3, T, H, W) float32 in [-1, 1]: x / 127.5 - 1.

    Raises ValueError for another dtype or number of channels.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"RGB frames are uint8 of shape (T, H, W, 3); got {frames.dtype} of shape {frames.shape}.")
    return _channels_first(frames).div_(127.5).sub_(1)


def flow_clip(flow: Flow, bound: float = FLOW_BOUND) -> Tensor:
    """(T, H, W, 2) flow in pixels as (2, T, H, W) float32 in [-1, 1]: clipped to ± `bound` pixels, u before v.

    Raises ValueError for integers, which are codes and not pixels, and for another number of channels.
    """
    if flow.ndim != 4 or flow.shape[3] != 2 or not np.issubdtype(flow.dtype, np.floating):
        raise ValueError(f"Flow is floats of shape (T, H, W, 2), in pixels; got {flow.dtype} of shape {flow.shape}.")
    return _channels_first(flow).div_(bound).clamp_(-1, 1)


def flow_bound(convention: Mapping[str, object] | None) -> float:
    """Pixels that a model's flow was clipped to, from the convention in its checkpoint; ±20 where that says nothing.

    Raises ConventionError where direction or unit differ from `pipelines.tvl1`, or the bound is no positive number.
    """
    if convention is None:
        return FLOW_BOUND
    ours = CodecSettings().flow_convention()
    for name in ("direction", "unit"):
        if convention.get(name) != ours[name]:
            raise ConventionError(
                f"The model's flow has the {name} {convention.get(name)!r}; computed here is {ours[name]!r}: "
                "train on flow extracted by this version."
            )
    bound = convention.get("bound_px")
    if not isinstance(bound, int | float) or not 0 < bound < float("inf"):
        raise ConventionError(f"The model's flow has bound_px {bound!r}; it must be a positive number of pixels.")
    return float(bound)


def decoded_side(contract: InputContract) -> int:
    """The shorter side in pixels to decode frames at for this contract: its own, or the next even number."""
    return contract.shorter_side + contract.shorter_side % 2


def count_test_frames(sampling: ClipSampling) -> int:
    """Frames from a video's first on that its test clips are cut from."""
    return sampling.num_clips * sampling.span


def cut_test_clips(
    video: Mapping[str, npt.NDArray], contract: InputContract, *, bound: float = FLOW_BOUND
) -> dict[str, Tensor]:
    """The test clips of a video, (N, C, T, size, size) for each stream that the contract names.

    `video` is RGB frames and flow in pixels by stream name, of which flow has one frame fewer. The N clips follow one
    another from the first frame on, cropped at the centre; a short stream is looped. The scores are the mean over N.
    Raises ValueError where a stream is missing, has no frame, or is smaller than the crop.
    """
    if absent := contract.test.streams.keys() - video.keys():
        raise ValueError(f"The video comes with {sorted(video)}; the model also needs {sorted(absent)}.")
    clips = {}
    for stream, sampling in contract.test.streams.items():
        frames = loop_to(centre_crop(video[stream], contract.size), count_test_frames(contract.test))
        cut = [frames[indices] for indices in _frame_indices(contract.test, sampling)]
        clips[stream] = torch.stack([rgb_clip(clip) if stream == "rgb" else flow_clip(clip, bound) for clip in cut])
    return clips


def _frame_indices(test: ClipSampling, sampling: StreamSampling) -> list[list[int]]:
    return [sampling.frame_indices(index * test.span) for index in range(test.num_clips)]


def _channels_first(frames: npt.NDArray) -> Tensor:
    """A float32 copy (C, T, H, W) of (T, H, W, C)."""
    return torch.from_numpy(np.array(frames.transpose(3, 0, 1, 2), np.float32, order="C"))
