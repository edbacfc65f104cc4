"""SAME padding, pooling and the bf16 gradients, against padding done by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from grids import sampled
from torch import nn

from models import build
from models.convolution import BatchNorm, Convolution, ConvUnit, MaxPool, same_padding


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pad_by_hand(x, kernel, stride, value):
    pads = []
    for n, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((math.ceil(n / s) - 1) * s + k - n, 0)
        pads = [total // 2, total - total // 2, *pads]
    return nn.functional.pad(x, pads, value=value)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        (64, 7, 2, (2, 3)),
        (79, 7, 2, (3, 3)),
        (250, 7, 2, (2, 3)),
        (112, 3, 2, (0, 1)),
        (125, 3, 2, (1, 1)),
        (63, 2, 2, (0, 1)),
        (14, 2, 2, (0, 0)),
        (7, 1, 2, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size, kernel, stride, pads):
    assert same_padding(size, kernel, stride) == pads


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    sampled(
        [(7, 7, 7), (3, 3, 3), (1, 3, 3), (1, 1, 1), (2, 4, 3)],
        [(1, 1, 1), (2, 2, 2), (1, 2, 2), (3, 2, 1)],
        [(8, 10, 9), (7, 11, 12), (1, 2, 3)],
        is_known=lambda kernel, stride, size: size == (1, 2, 3) and max(kernel) > 1 and stride != (1, 1, 1),
    ),
)
def test_convolution_pads_as_by_hand(kernel, stride, size):
    conv = Convolution(3, 5, kernel, stride=stride, bias=True).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = nn.functional.conv3d(pad_by_hand(x, kernel, stride, 0.0), conv.weight, conv.bias, stride)
    torch.testing.assert_close(conv(x), expected)
    assert expected.shape[2:] == tuple(math.ceil(n / s) for n, s in zip(size, stride, strict=True))


@pytest.mark.parametrize("size", [(8, 10, 9), (7, 11, 12), (1, 2, 3), (2, 7, 7)])
def test_pool_pads_as_by_hand(size):
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last_3d)
    for kernel, stride in itertools.product([(1, 3, 3), (3, 3, 3), (2, 2, 2), (4, 3, 2), (5, 1, 3)], [1, 2, 3]):
        expected = nn.functional.max_pool3d(pad_by_hand(x, kernel, (stride,) * 3, -math.inf), kernel, stride)
        assert torch.equal(MaxPool(kernel, (stride,) * 3)(x), expected)


def test_batch_norm_without_gamma_is_that_of_ones():
    plain, scaled = BatchNorm(4, momentum=0.1), BatchNorm(4, momentum=0.1, gamma=True)
    x = torch.randn(2, 4, 3, 5, 5)
    assert [name for name, _ in plain.named_parameters()] == ["bias"]
    torch.testing.assert_close(plain(x), scaled(x))
    torch.testing.assert_close(plain.running_var, scaled.running_var)


def test_activations_stay_channels_last():
    unit = ConvUnit(Convolution(4, 8, (3, 3, 3)), BatchNorm(8, momentum=0.1))
    x = torch.randn(2, 4, 4, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    assert MaxPool((3, 3, 3), (2, 2, 2))(unit(x)).is_contiguous(memory_format=torch.channels_last_3d)


def weight_gradients(conv, x, gradient, *, bf16):
    conv.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        y = conv(x)
    y.backward(gradient.to(y.dtype))
    return conv.weight.grad.clone()


@pytest.mark.parametrize(
    ("depth", "kernel", "side"),
    sampled(
        [1, 2, 3, 4, 5, 7],
        [1, 3, 5, 7],
        [1, 2, 4],
        is_known=lambda depth, kernel, side: side == 2 and (depth, kernel) in ((2, 3), (7, 7)),
    ),
)
def test_weight_gradients_are_right_at_every_small_size(depth, kernel, side):
    """Sizes at which oneDNN by itself returns uninitialised memory, among others at which it does not."""
    for stride in ((1, 1, 1), (2, 2, 2)):
        conv = Convolution(16, 32, (kernel, 7, 3), stride=stride)
        x = torch.randn(2, 16, depth, side, side).contiguous(memory_format=torch.channels_last_3d)
        gradient = torch.randn_like(conv(x).detach())
        fp32, bf16 = (weight_gradients(conv, x, gradient, bf16=bf16) for bf16 in (False, True))
        exact = weight_gradients(conv.double(), x.double(), gradient.double(), bf16=False)
        assert relative_error(fp32, exact) < 1e-5
        assert relative_error(bf16, exact) < 0.02


@pytest.mark.parametrize("frames", [16, 32])
def test_bf16_weight_gradients_of_every_layer_of_i3d(frames):
    model = build("i3d", num_classes=8, width=0.25, frames=frames, test_frames=frames, size=64)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, Convolution) and name != "logits":
            module.register_forward_hook(lambda m, args, y, name=name: inputs.update({name: (m, args[0], y.shape)}))
    model(torch.rand(2, 3, frames, 64, 64) * 2 - 1)
    assert len(inputs) == 57
    for name, (conv, x, shape) in inputs.items():
        gradient = torch.randn(shape)
        exact = weight_gradients(conv, x.detach(), gradient, bf16=False)
        assert relative_error(weight_gradients(conv, x.detach(), gradient, bf16=True), exact) < 0.02, name


def relative_error(value, exact):
    return ((value - exact).norm() / exact.norm()).item()
