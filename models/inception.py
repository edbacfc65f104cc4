"""Inception-V1 with batch norm (Szegedy et al. 2015; Ioffe & Szegedy 2015) from one table, framewise or inflated.

With all temporal kernels and strides 1 (`FRAMEWISE`) it is the 2-D network applied to each frame; with the paper's it
is the trunk of I3D. Layers carry TF-slim's end point names in both cases, so weights of either find their place.
The branch that slim calls 5×5 has 3×3 kernels, in slim's released weights as in I3D's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.convolution import BatchNorm, Convolution, ConvUnit, Extent, MaxPool

# Output channels of each Mixed block: branch 0; branch 1's 1×1 and 3×3; branch 2's 1×1 and 3×3; branch 3's 1×1.
BRANCH_WIDTHS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
STEM_WIDTHS = {"Conv3d_1a_7x7": 64, "Conv3d_2b_1x1": 64, "Conv3d_2c_3x3": 192}
POOLS = ("MaxPool3d_2a_3x3", "MaxPool3d_3a_3x3", "MaxPool3d_4a_3x3", "MaxPool3d_5a_2x2")
POOL_SIZES = (3, 3, 3, 2)  # the last is 3 in Szegedy et al., 2 in slim and in I3D
ENDPOINTS = (
    *("Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "MaxPool3d_3a_3x3"),
    *("Mixed_3b", "Mixed_3c", "MaxPool3d_4a_3x3", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
    *("MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c"),
)


@dataclass(frozen=True, kw_only=True)
class TemporalExtents:
    """Temporal kernels and strides of Inception's layers; the defaults are I3D's (paper, Figure 3).

    `pool_kernels` and `pool_strides` are of the four max-pools between blocks, in order; `mixed_conv_kernel` and
    `mixed_pool_kernel` of the 3×3 convolutions (2c included) and of the stride-1 pools within the Mixed blocks.
    A kernel of 1 leaves that layer 1×k×k.
    """

    conv1_kernel: int = 7
    conv1_stride: int = 2
    # The first two leave time alone: pooled too early, edges of different objects run together (section 2.4).
    pool_kernels: tuple[int, int, int, int] = (1, 1, 3, 2)
    pool_strides: tuple[int, int, int, int] = (1, 1, 2, 2)
    mixed_conv_kernel: int = 3
    mixed_pool_kernel: int = 3

    def __post_init__(self) -> None:
        extents = (self.conv1_kernel, self.conv1_stride, self.mixed_conv_kernel, self.mixed_pool_kernel)
        if len(self.pool_kernels) != len(POOLS) or len(self.pool_strides) != len(POOLS):
            raise ValueError(
                f"pool_kernels {self.pool_kernels} and pool_strides {self.pool_strides} need one entry for each of "
                f"{', '.join(POOLS)}."
            )
        if min(*extents, *self.pool_kernels, *self.pool_strides) < 1:
            raise ValueError(f"{self} has a kernel or stride below 1; 1 leaves the time axis as it is.")

    def strides(self) -> dict[str, int]:
        """The temporal stride of each end point's layer, in order."""
        strides = {"Conv3d_1a_7x7": self.conv1_stride, **dict(zip(POOLS, self.pool_strides, strict=True))}
        return {name: strides.get(name, 1) for name in ENDPOINTS}


FRAMEWISE = TemporalExtents(
    conv1_kernel=1,
    conv1_stride=1,
    pool_kernels=(1, 1, 1, 1),
    pool_strides=(1, 1, 1, 1),
    mixed_conv_kernel=1,
    mixed_pool_kernel=1,
)


@dataclass(frozen=True, kw_only=True)
class UnitFactory:
    """Makes conv-BN-ReLU units of one width, momentum and gamma."""

    width: float = 1.0
    bn_momentum: float = 0.001
    bn_gamma: bool = False

    def channels(self, channels: int) -> int:
        """The paper's number of channels, scaled by the width."""
        # At least 1: a very narrow network would lose its narrowest branch.
        return max(1, round(channels * self.width))

    def __call__(self, in_channels: int, out_channels: int, kernel: Extent, stride: Extent = (1, 1, 1)) -> ConvUnit:
        norm = BatchNorm(out_channels, momentum=self.bn_momentum, gamma=self.bn_gamma)
        return ConvUnit(Convolution(in_channels, out_channels, kernel, stride=stride), norm)


class Mixed(nn.Module):
    """Inception's block: four branches of (B, in_channels, T, H, W), concatenated to (B, out_channels, T, H, W)."""

    def __init__(
        self, in_channels: int, widths: tuple[int, ...], *, unit: UnitFactory, temporal: TemporalExtents
    ) -> None:
        super().__init__()
        point = (1, 1, 1)
        cube = (temporal.mixed_conv_kernel, 3, 3)
        b0, b1a, b1b, b2a, b2b, b3 = (unit.channels(w) for w in widths)
        self.out_channels = b0 + b1b + b2b + b3
        self.Branch_0 = nn.Sequential()
        self.Branch_0.add_module("Conv3d_0a_1x1", unit(in_channels, b0, point))
        self.Branch_1 = nn.Sequential()
        self.Branch_1.add_module("Conv3d_0a_1x1", unit(in_channels, b1a, point))
        self.Branch_1.add_module("Conv3d_0b_3x3", unit(b1a, b1b, cube))
        self.Branch_2 = nn.Sequential()
        self.Branch_2.add_module("Conv3d_0a_1x1", unit(in_channels, b2a, point))
        self.Branch_2.add_module("Conv3d_0b_3x3", unit(b2a, b2b, cube))
        self.Branch_3 = nn.Sequential()
        self.Branch_3.add_module("MaxPool3d_0a_3x3", MaxPool((temporal.mixed_pool_kernel, 3, 3), point))
        self.Branch_3.add_module("Conv3d_0b_1x1", unit(in_channels, b3, point))

    def forward(self, x: Tensor) -> Tensor:
        # In the order in which they were added: released weights have the branches' channels in it.
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class InceptionV1(nn.Sequential):
    """The trunk up to Mixed_5c: (B, in_channels, T, H, W) to (B, out_channels, T', ⌈H/32⌉, ⌈W/32⌉).

    At width 1 out_channels is 1024; T' is T over the temporal strides, rounded up at each.
    """

    def __init__(self, in_channels: int, *, unit: UnitFactory, temporal: TemporalExtents = FRAMEWISE) -> None:
        super().__init__()
        channels = in_channels
        for name, layer in _layers(in_channels, unit=unit, temporal=temporal):
            self.add_module(name, layer)
            channels = layer.out_channels if isinstance(layer, Mixed) else channels
        self.in_channels, self.out_channels = in_channels, channels

    def forward(self, x: Tensor, endpoint: str = "Mixed_5c") -> Tensor:
        """The activation at an end point; a ValueError lists the names where it is none of them."""
        if endpoint not in ENDPOINTS:
            raise ValueError(f"No end point is called {endpoint!r}; choose one of {', '.join(ENDPOINTS)}.")
        for name, layer in self.named_children():
            x = layer(x)
            if name == endpoint:
                break
        return x


def _layers(in_channels: int, *, unit: UnitFactory, temporal: TemporalExtents) -> Iterator[tuple[str, nn.Module]]:
    """The layers of the trunk in order, by end point name."""
    pool_sizes = dict(zip(POOLS, zip(temporal.pool_kernels, POOL_SIZES, strict=True), strict=True))
    stem_kernels = {
        "Conv3d_1a_7x7": (temporal.conv1_kernel, 7, 7),
        "Conv3d_2b_1x1": (1, 1, 1),
        "Conv3d_2c_3x3": (temporal.mixed_conv_kernel, 3, 3),
    }
    channels = in_channels
    for name, stride in temporal.strides().items():
        if name in POOLS:
            t, k = pool_sizes[name]
            yield name, MaxPool((t, k, k), (stride, 2, 2))
        elif name in stem_kernels:
            width = unit.channels(STEM_WIDTHS[name])
            step = 2 if name == "Conv3d_1a_7x7" else 1
            yield name, unit(channels, width, stem_kernels[name], (stride, step, step))
            channels = width
        else:
            block = Mixed(channels, BRANCH_WIDTHS[name], unit=unit, temporal=temporal)
            yield name, block
            channels = block.out_channels


def count_time_steps(strides: dict[str, int], frames: int) -> dict[str, int]:
    """Time steps after each layer of a clip of `frames`, from the layers' temporal strides.

    Raises ValueError naming the first layer whose stride is longer than what reaches it: SAME padding would let it
    return one step, mostly padding, and the setting would have no effect of its own.
    """
    steps = {}
    reaching = frames
    for name, stride in strides.items():
        if stride > reaching:
            raise ValueError(
                f"{name} leaves no time steps: {reaching} of the clip's {frames} reach it and its temporal stride is "
                f"{stride}. Use longer clips, or smaller temporal strides up to this layer."
            )
        reaching = math.ceil(reaching / stride)  # SAME padding rounds up
        steps[name] = reaching
    return steps
