"""Convolution, pooling and batch norm on clips (B, C, T, H, W), with TensorFlow's SAME padding at every size.

A 2-D network is a 3-D one whose temporal kernels and strides are 1, so these few layers serve all five models.
They keep every activation in channels_last_3d, where this is also the quick form on a CPU: a 1×1×1 convolution is one
matrix product, and a pool needs no padded copy. For a GPU `models.cuda.place` puts other layers in the place of some.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

Extent = tuple[int, int, int]  # along time, height, width


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after) of one axis: the output has ceil(size / stride) elements."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2  # the odd element comes last: PyTorch's own padding cannot say so


class Convolution(nn.Module):
    """SAME convolution of (B, in, T, H, W) to (B, out, ⌈T/s⌉, ⌈H/s⌉, ⌈W/s⌉); weights as Sonnet draws them.

    The weight (out, in, t, h, w) is a normal of standard deviation 1/√fan_in truncated at two of them, the bias zero.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Extent, *, stride: Extent = (1, 1, 1), bias: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        shape = (out_channels, in_channels, *kernel)
        self.weight = nn.Parameter(torch.empty(shape, memory_format=torch.channels_last_3d))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        _draw_truncated_normal(self.weight, std=1 / math.sqrt(in_channels * math.prod(kernel)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == self.stride == (1, 1, 1):
            # PyTorch sends such a conv3d on one thread to slow_conv3d: half as fast, and channels_last_3d is lost.
            rows = nn.functional.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
            return rows.permute(0, 4, 1, 2, 3)
        x, padding = pad_for_convolution(x, self.kernel, self.stride)
        return nn.functional.conv3d(x, self.weight, self.bias, self.stride, padding)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight.shape[:2]
        return (
            f"{in_channels}, {out_channels}, kernel={self.kernel}, stride={self.stride}, bias={self.bias is not None}"
        )


@torch.no_grad()
def _draw_truncated_normal(weight: Tensor, std: float) -> None:
    """Fills the weight from a normal cut at two standard deviations, by the inverse of its distribution function.

    The same as torch.nn.init.trunc_normal_, which takes over a second for I3D's 12 million weights.
    """
    if weight.is_meta:  # nothing to draw, at which PyTorch would import its compiler first: a second
        return
    # The share of a normal within two deviations, 0.954: erfinv of ±cut is ±2/√2.
    cut = math.erf(2 / math.sqrt(2))
    weight.uniform_(-cut, cut).erfinv_().mul_(std * math.sqrt(2))


class Classifier(Convolution):
    """The 1×1×1 convolution with a bias that gives the logits, in its weights' own dtype also under autocast.

    In bfloat16 the logits of one video in fifty would tie.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, (1, 1, 1), bias=True)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return super().forward(x.to(self.weight.dtype))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it operations keep the dtype of what they are given."""
    # Costs are counted and input specs asked on the meta device, which autocast does not know.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class MaxPool(nn.Module):
    """SAME max-pooling of (B, C, T, H, W)."""

    def __init__(self, kernel: Extent, stride: Extent) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], self.kernel, self.stride, strict=True)]
        if any(after > before and s == 1 for (before, after), s in zip(pads, self.stride, strict=True)):
            # At stride 1 ceil_mode adds no window behind, so an even kernel needs the copy.
            x, pads = nn.functional.pad(x, pad_argument(pads), value=-math.inf), [(0, 0)] * 3
        # ceil_mode lets the last window hang over the border by the one element that SAME adds behind, without a copy.
        return nn.functional.max_pool3d(x, self.kernel, self.stride, [before for before, _ in pads], ceil_mode=True)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


class BatchNorm(nn.BatchNorm3d):
    """Batch norm over (B, T, H, W), ε = 1e-3, by default without gamma, as in TF-slim and Sonnet.

    Every convolution of Inception is followed by batch norm and ReLU, and then by something linear or a maximum: a
    positive scale commutes with these, so gamma adds nothing that the next weights cannot hold. The released
    checkpoints have none, and the paper's parameter counts fit without it. In its place is a constant of ones that no
    checkpoint holds: with none at all PyTorch's kernels for GPUs return no gradient of the bias either.
    """

    def __init__(self, channels: int, *, momentum: float, gamma: bool = False) -> None:
        super().__init__(channels, eps=1e-3, momentum=momentum)
        if not gamma:
            del self.weight
            self.register_buffer("weight", torch.ones(channels), persistent=False)


class ConvUnit(nn.Module):
    """Convolution, batch norm, ReLU: the unit that Inception and C3D are made of."""

    def __init__(self, conv: Convolution, bn: BatchNorm) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        # In place: batch norm's gradient needs its input, and ReLU's the result.
        return nn.functional.relu(self.bn(self.conv(x)), inplace=True)


def pad_for_convolution(x: Tensor, kernel: Extent, stride: Extent) -> tuple[Tensor, Extent]:
    """x, padded where PyTorch's symmetric padding cannot express SAME, and the symmetric padding that is left to do.

    In channels_last_3d: in PyTorch's own layout conv1 takes a quarter longer on a CPU, and max-pools after it 10 to 20
    times as long.
    """
    x = x.contiguous(memory_format=torch.channels_last_3d)
    pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    axes = zip(x.shape[2:], kernel, stride, pads, strict=True)
    explicit = [p if p[0] != p[1] or (n <= k and _has_wrong_gradient(x, s)) else (0, 0) for n, k, s, p in axes]
    # Of uneven padding the part behind is the larger one, so looking at it alone finds all.
    if any(after for _, after in explicit):
        x = nn.functional.pad(x, pad_argument(explicit))
    # All axes that are even stay with conv3d, for F.pad copies the whole activation.
    t, h, w = (0 if pad == done else pad[0] for pad, done in zip(pads, explicit, strict=True))
    return x, (t, h, w)


def _has_wrong_gradient(x: Tensor, stride: int) -> bool:
    """Whether oneDNN's weight gradient cannot be trusted along a padded axis that is not longer than the kernel.

    In torch 2.13 on a CPU it is then wrong, without an error, in bf16 (two time steps under a kernel of 3, as in
    Mixed_5 of a 16-frame clip) and in fp32 with a stride (seven steps under a kernel of 7): uninitialised memory, up to
    inf, and sometimes the heap is overwritten. With the padding done beforehand the same convolution is right.
    """
    # Under autocast x is still float32 here: conv3d itself casts it.
    bf16 = x.dtype == torch.bfloat16 or (x.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
    return x.device.type == "cpu" and torch.is_grad_enabled() and (bf16 or stride > 1)


def pad_argument(pads: list[tuple[int, int]]) -> list[int]:
    return [n for pad in reversed(pads) for n in pad]  # F.pad counts axes from the last
