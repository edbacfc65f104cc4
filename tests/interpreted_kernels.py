"""Run under TRITON_INTERPRET=1 by test_cuda.py: the networks' Triton kernels beside PyTorch's, as one line of JSON."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import cuda, triton_kernels
from models.convolution import BatchNorm, MaxPool

# Kernel, stride and extent of the networks' pools, and odd sizes: no padding, padding on either side, one element.
POOLS = [
    ((1, 3, 3), (1, 2, 2), (2, 8, 8)),
    ((1, 3, 3), (1, 2, 2), (1, 7, 9)),
    ((3, 3, 3), (2, 2, 2), (4, 6, 6)),
    ((3, 3, 3), (2, 2, 2), (5, 7, 7)),
    ((2, 2, 2), (2, 2, 2), (4, 6, 6)),
    ((2, 2, 2), (2, 2, 2), (3, 7, 7)),
    ((3, 3, 3), (1, 1, 1), (2, 7, 7)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 2)),
    ((1, 3, 3), (1, 1, 1), (2, 5, 4)),
    ((2, 4, 3), (1, 3, 2), (3, 9, 8)),
    ((5, 1, 3), (3, 2, 1), (4, 3, 5)),
]


def channels_last(*shape: int, values: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers; of few whole `values` where that is given, so that maxima tie and sums are exact."""
    x = torch.randn(shape) if values is None else torch.randint(values, shape)
    return x.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def pool_differs(kernel: tuple, stride: tuple, x: Tensor) -> bool:
    """Whether value or gradient differ anywhere from PyTorch's pool on the CPU."""
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = cuda.max_pool(ours, kernel, stride), MaxPool(kernel, stride)(theirs)
    dy = channels_last(*expected.shape, values=7, dtype=x.dtype)
    y.backward(dy)
    expected.backward(dy)
    equal = torch.equal(torch.nan_to_num(y, 99), torch.nan_to_num(expected, 99)) and torch.equal(ours.grad, theirs.grad)
    return not (equal and y.is_contiguous(memory_format=torch.channels_last_3d))


def pools() -> list[str]:
    """The pools that differ."""
    differing = []
    for number, (kernel, stride, size) in enumerate(POOLS):
        x = channels_last(2, 70 if number in (1, 7) else 3, *size, values=4)
        differing += [f"{kernel} {stride} {size}"] if pool_differs(kernel, stride, x) else []
    x = channels_last(1, 5, 3, 4, 4, values=4)
    x[0, 0, 1, 2, 3], x[0, 1, 0, 0, 0] = float("nan"), float("-inf")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        differing += [f"{dtype}"] if pool_differs((3, 3, 3), (1, 1, 1), x.to(dtype)) else []
    return differing


def norms() -> dict[str, float]:
    """The greatest difference of batch norm with ReLU to PyTorch's in fp64, of each thing that it gives or changes."""
    worst: dict[str, float] = {}
    for channels, gamma, size in ((3, False, (2, 5, 4)), (70, True, (1, 3, 7)), (24, False, (3, 12, 12))):
        ours = BatchNorm(channels, momentum=0.3, gamma=gamma)
        ours.num_batches_tracked.fill_(4)
        nn.init.uniform_(ours.bias, -1, 1)
        theirs = copy.deepcopy(ours).double()
        x = channels_last(2, channels, *size) * 3 + 2
        # As of something concatenated: some channels of more.
        dy = channels_last(2, channels + 16, *size)[:, 8 : channels + 8] if gamma else channels_last(*x.shape)
        found = results(x, ours, cuda.norm_relu, dy)
        right = results(x.double(), theirs, lambda x, norm: nn.functional.relu(norm(x)), dy.double())
        for name, value in right.items():
            worst[name] = max(worst.get(name, 0.0), float((found[name] - value).abs().max()))
    return worst


def results(x: Tensor, norm: BatchNorm, apply: Callable[[Tensor, BatchNorm], Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one training step."""
    x = x.detach().clone().requires_grad_()
    y = apply(x, norm)
    y.backward(dy)
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in norm.named_parameters()}
    return {"y": y.detach(), "gradient of x": x.grad, **gradients, **dict(norm.named_buffers())}


def bias_relu() -> float:
    x, bias = channels_last(2, 70, 2, 3, 5), torch.randn(70)
    expected = (x + bias.view(-1, 1, 1, 1)).relu()
    return float((triton_kernels.bias_relu_(x, bias) - expected).abs().max())


def blocks() -> float:
    """The greatest difference of a clip's blocks to those by PyTorch, of clips in either layout."""
    worst = 0.0
    for channels, kernel, stride, size in (
        (3, (7, 7, 7), (2, 2, 2), (5, 9, 8)),
        (2, (1, 7, 7), (1, 2, 2), (2, 6, 11)),
        (3, (3, 3, 3), (1, 1, 1), (3, 4, 5)),
        (1, (2, 1, 5), (3, 2, 1), (7, 5, 3)),
    ):
        for clip in (torch.randn(2, channels, *size), channels_last(2, channels, *size)):
            taps = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]
            expected = cuda._blocks_of(clip, kernel, stride, taps, clip.dtype)
            found = torch.full_like(expected, 9)
            before = [before for before, _ in cuda._pads(clip, kernel, stride)]
            triton_kernels.space_to_depth(clip, found, stride, before)
            worst = max(worst, float((found - expected).abs().max()))
    return worst


def operations() -> dict[str, str]:
    """What PyTorch's own checks say of the pool as a custom operation, and whether it compiles to one graph."""
    x, kernel, stride = channels_last(2, 3, 2, 4, 5).requires_grad_(), [3, 3, 3], [2, 2, 2]
    y, places = cuda._max_pool(x.detach(), kernel, stride, True)
    found = torch.library.opcheck(cuda._max_pool, (x, kernel, stride, True))
    found |= torch.library.opcheck(cuda._max_pool_gradient, (torch.randn_like(y), places, kernel, stride, [2, 4, 5]))
    compiled = torch.compile(lambda x: cuda.max_pool(x, (3, 3, 3), (2, 2, 2)), backend="aot_eager", fullgraph=True)
    dy = torch.randn_like(y)
    gradients = [
        torch.autograd.grad(pool(x), x, dy)[0] for pool in (compiled, lambda x: cuda.max_pool(x, (3, 3, 3), (2, 2, 2)))
    ]
    return {**found, "compiled": "SUCCESS" if torch.equal(*gradients) else "FAILED"}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # So that each program adds up several blocks of these few numbers.
    triton_kernels.PROGRAMS = triton_kernels.STATISTICS_PROGRAMS = 4
    triton_kernels.STATISTICS_BLOCK = 64
    if sys.argv[1:] == ["operations"]:
        json.dump(operations(), sys.stdout)
    else:
        json.dump({"pools": pools(), "norms": norms(), "bias_relu": bias_relu(), "blocks": blocks()}, sys.stdout)
