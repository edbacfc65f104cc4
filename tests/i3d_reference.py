"""I3D written a second time, plainly: one function over DeepMind's variable names and TensorFlow's axis order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

BLOCKS = [
    ("Mixed_3b", 192, 64, 96, 128, 16, 32, 32),
    ("Mixed_3c", 256, 128, 128, 192, 32, 96, 64),
    ("Mixed_4b", 480, 192, 96, 208, 16, 48, 64),
    ("Mixed_4c", 512, 160, 112, 224, 24, 64, 64),
    ("Mixed_4d", 512, 128, 128, 256, 24, 64, 64),
    ("Mixed_4e", 512, 112, 144, 288, 32, 64, 64),
    ("Mixed_4f", 528, 256, 160, 320, 32, 128, 128),
    ("Mixed_5b", 832, 256, 160, 320, 32, 128, 128),
    ("Mixed_5c", 832, 384, 192, 384, 48, 128, 128),
]


def unit_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """DeepMind's 57 unit names and the shapes [t, h, w, in, out] of their filters."""
    shapes: dict[str, tuple[int, ...]] = {
        "Conv3d_1a_7x7": (7, 7, 7, channels, 64),
        "Conv3d_2b_1x1": (1, 1, 1, 64, 64),
        "Conv3d_2c_3x3": (3, 3, 3, 64, 192),
    }
    for block, cin, b0, b1a, b1b, b2a, b2b, b3 in BLOCKS:
        second = "Conv3d_0a_3x3" if block == "Mixed_5b" else "Conv3d_0b_3x3"
        shapes[f"{block}/Branch_0/Conv3d_0a_1x1"] = (1, 1, 1, cin, b0)
        shapes[f"{block}/Branch_1/Conv3d_0a_1x1"] = (1, 1, 1, cin, b1a)
        shapes[f"{block}/Branch_1/Conv3d_0b_3x3"] = (3, 3, 3, b1a, b1b)
        shapes[f"{block}/Branch_2/Conv3d_0a_1x1"] = (1, 1, 1, cin, b2a)
        shapes[f"{block}/Branch_2/{second}"] = (3, 3, 3, b2a, b2b)
        shapes[f"{block}/Branch_3/Conv3d_0b_1x1"] = (1, 1, 1, cin, b3)
    return shapes


def released_variables(channels: int, *, num_classes: int = 400, seed: int = 0) -> dict[str, Tensor]:
    """The 230 variables of a released checkpoint, without prefix, with random values that keep activations alive."""
    draw = torch.Generator().manual_seed(seed)
    variables = {}
    for unit, shape in unit_shapes(channels).items():
        fan_in, width = shape[0] * shape[1] * shape[2] * shape[3], shape[4]
        variables[f"{unit}/conv_3d/w"] = torch.randn(shape, generator=draw) * (2 / fan_in) ** 0.5
        variables[f"{unit}/batch_norm/beta"] = torch.randn(width, generator=draw) * 0.2
        variables[f"{unit}/batch_norm/moving_mean"] = torch.randn(width, generator=draw) * 0.2
        variables[f"{unit}/batch_norm/moving_variance"] = torch.rand(width, generator=draw) + 0.5
    variables["Logits/Conv3d_0c_1x1/conv_3d/w"] = torch.randn(1, 1, 1, 1024, num_classes, generator=draw) / 32
    variables["Logits/Conv3d_0c_1x1/conv_3d/b"] = torch.randn(num_classes, generator=draw)
    return variables


def reference_logits(variables: Mapping[str, Tensor], x: Tensor, *, training: bool = False) -> Tensor:
    """Logits (B, classes) of clips (B, C, T, H, W); with `training` batch norm takes the batch's own statistics."""
    w = variables["Logits/Conv3d_0c_1x1/conv_3d/w"].permute(4, 3, 0, 1, 2)
    pooled = _pool(variables, x, training)
    return nn.functional.conv3d(pooled, w, variables["Logits/Conv3d_0c_1x1/conv_3d/b"]).mean(dim=(2, 3, 4))


def reference_features(variables: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Vectors (B, 1024) of clips (B, C, T, H, W): what the classifier sees, averaged over time."""
    return _pool(variables, x, training=False).mean(dim=(2, 3, 4))


def _pool(variables: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """Mixed_5c after its 2×7×7 average pool, (B, 1024, T', 1, 1)."""

    def unit(name: str, x: Tensor, stride: int = 1) -> Tensor:
        w = variables[f"{name}/conv_3d/w"].permute(4, 3, 0, 1, 2)
        x = nn.functional.conv3d(_pad(x, w.shape[2:], (stride,) * 3, 0.0), w, stride=stride)
        mean, var = (variables[f"{name}/batch_norm/moving_{k}"].detach().clone() for k in ("mean", "variance"))
        beta = variables[f"{name}/batch_norm/beta"]
        return nn.functional.batch_norm(x, mean, var, None, beta, training, eps=1e-3).relu()

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return nn.functional.max_pool3d(_pad(x, kernel, stride, float("-inf")), kernel, stride)

    def mixed(block: str, x: Tensor) -> Tensor:
        second = "Conv3d_0a_3x3" if block == "Mixed_5b" else "Conv3d_0b_3x3"
        b0 = unit(f"{block}/Branch_0/Conv3d_0a_1x1", x)
        b1 = unit(f"{block}/Branch_1/Conv3d_0b_3x3", unit(f"{block}/Branch_1/Conv3d_0a_1x1", x))
        b2 = unit(f"{block}/Branch_2/{second}", unit(f"{block}/Branch_2/Conv3d_0a_1x1", x))
        b3 = unit(f"{block}/Branch_3/Conv3d_0b_1x1", pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([b0, b1, b2, b3], dim=1)

    x = pool(unit("Conv3d_1a_7x7", x, stride=2), (1, 3, 3), (1, 2, 2))
    x = pool(unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x)), (1, 3, 3), (1, 2, 2))
    for block, *_ in BLOCKS:
        if block == "Mixed_4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if block == "Mixed_5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        x = mixed(block, x)
    return nn.functional.avg_pool3d(x, (2, *x.shape[3:]), stride=1)


def _pad(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> Tensor:
    pads: list[int] = []
    for n, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
        pads += [total // 2, total - total // 2]
    return nn.functional.pad(x, pads, value=value)
