"""Flow as integer codes where it is computed, so that codes leave a GPU and not floats: `codec.quantise` in torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipelines.media.codec import FlowScale

FIXED_POINT = 1 << 16  # lengths are summed in integers of so many to a code: the same sum in any order


@dataclass(frozen=True)
class DeviceLevels:
    """A batch of quantised flow on the device: B stacked images with their counts.

    codes    (B, 2H, W) uint8, or int16 where codec.quantise gives uint16
    lengths  (B,) int64, sum of the vectors' lengths in codes, FIXED_POINT to a code
    clipped  (B,) int64, components stored as -bound or +bound
    finite   () bool, whether all of the flow was
    """

    codes: torch.Tensor
    lengths: torch.Tensor
    clipped: torch.Tensor
    finite: torch.Tensor


def quantise_planes(flow: torch.Tensor, scale: FlowScale) -> DeviceLevels:
    """Codes and counts of flow planes (B, 2, H, W) float32 in px, u before v; the codes are those of codec.quantise."""
    batch, _, height, width = flow.shape
    # Each step rounds to float32 by itself, as NumPy's do: multiplied and added in one, ties would fall elsewhere.
    codes = flow.clamp(-scale.bound, scale.bound)
    codes.mul_(float(np.float32(1 / scale.step))).add_(float(np.float32(scale.zero_code))).round_()
    ends = scale.lowest, scale.lowest + scale.levels - 1
    clipped = ((codes <= ends[0]) | (codes >= ends[1])).flatten(1).sum(1)
    dtype = torch.uint8 if scale.dtype is np.uint8 else torch.int16
    image = codes.to(dtype).reshape(batch, 2 * height, width)
    codes.sub_(float(np.float32(scale.zero_code))).square_()
    lengths = (codes.sum(1).sqrt_() * FIXED_POINT).round_().to(torch.int64).flatten(1).sum(1)
    return DeviceLevels(codes=image, lengths=lengths, clipped=clipped, finite=flow.isfinite().all())
