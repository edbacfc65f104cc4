"""All that is done for CUDA alone; the networks' own files know nothing of it.

    cuda.set_up(device, "bf16", training=True)    once in a process: TensorFloat-32, cuDNN's search, one check
    model = cuda.place(model, device)             layers that compute the same in another way

On a CPU both do nothing. A model that was moved by `model.to("cuda")` alone gives the same results, slower.

* A convolution of two or three channels in half precision goes to a kernel without tensor cores, which took a third
  of I3D's step. Its windows are laid out along the width first, to 16 or 24 channels and a kernel of width 1.
* Max-pools, and batch norm with ReLU, are Triton kernels (`models.triton_kernels`); without Triton, PyTorch's.

What these bring has not been measured.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.convolution import (
    BatchNorm,
    Convolution,
    ConvUnit,
    Extent,
    MaxPool,
    pad_argument,
    pad_for_convolution,
    same_padding,
)
from models.folding import FoldedUnit

Model = TypeVar("Model", bound=nn.Module)

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALVES = (torch.bfloat16, torch.float16)
FEW_CHANNELS = 4  # fewer than this: the convolution that sees the clip
WHOLE_CHANNELS = 8  # multiples of this are what cuDNN's kernels for tensor cores take
MAX_WINDOW = 255  # places that one byte tells apart, with one to spare
# Relative error that a small convolution may have, by what it is computed in: several times what rounding gives, so
# that no run ends by a false alarm.
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 2e-2, "fp16": 5e-3}


class ConvolutionError(ValueError):
    """The convolutions of this machine's PyTorch and cuDNN give wrong numbers."""


def set_up(device: torch.device, precision: str, *, training: bool) -> None:
    """What holds for a whole process that computes on `device`; nothing on a CPU.

    The one place that decides about TensorFloat-32, for convolutions and matrix products alike (see `describe`), and
    about cuDNN's search for its quickest kernel, which pays where all batches have one shape. Raises ConvolutionError.
    """
    if device.type != "cuda":
        return
    allow_tf32(uses_tf32(precision, training=training))
    torch.backends.cudnn.benchmark = training  # at test each length of video is a shape of its own
    check_convolution(device, precision, training=training)


def allow_tf32(allowed: bool) -> None:
    """Allows TensorFloat-32 for products in fp32, or not.

    By these names, and not by `fp32_precision`: what was set by that, torch.compile cannot read in all versions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some versions advise the other names
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def uses_tf32(precision: str, *, training: bool) -> bool:
    """Whether fp32 products are computed in TensorFloat-32, which keeps three digits of a factor: in training only."""
    return training and precision == "fp32"


def describe(precision: str, *, training: bool) -> str:
    """What a precision means on CUDA, in words for a log."""
    if precision != "fp32":
        return f"{precision}, sums and logits in fp32"
    return "fp32, products in TensorFloat-32" if uses_tf32(precision, training=training) else "fp32, no TensorFloat-32"


def check_convolution(device: torch.device, precision: str, *, training: bool) -> None:
    """Compares one small conv3d, in training with its gradients, with the same in fp32 on the CPU.

    PyTorch 2.9 was released with 3-D convolutions that some versions of cuDNN compute wrong in bf16, without an error.
    """
    computed = _convolve_example(device, DTYPES[precision], training=training)
    exact = _convolve_example(torch.device("cpu"), torch.float32, training=training)
    error = max(_relative_error(result, right) for result, right in zip(computed, exact, strict=True))
    if not error <= TOLERANCES["tf32" if uses_tf32(precision, training=training) else precision]:
        cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        raise ConvolutionError(
            f"conv3d in {precision} is off by {error:.2g} of its value on {device}, with torch {torch.__version__} and "
            f"cuDNN {cudnn}: no result could be trusted; install another version of torch"
        )


@torch.enable_grad()
def _convolve_example(device: torch.device, dtype: torch.dtype, *, training: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    clip, weight = (
        torch.randn(shape, generator=generator).to(device, dtype, memory_format=torch.channels_last_3d)
        for shape in ((2, 16, 4, 9, 9), (32, 16, 3, 3, 3))
    )
    clip.requires_grad_(training)
    weight.requires_grad_(training)
    y = nn.functional.conv3d(clip, weight, None, (1, 2, 2), (1, 1, 1))
    return [y, *torch.autograd.grad(y, (clip, weight), torch.ones_like(y))] if training else [y]


def _relative_error(result: Tensor, right: Tensor) -> float:
    result, right = result.detach().double().cpu(), right.detach().double()
    error = float((result - right).norm() / right.norm())
    return math.inf if math.isnan(error) else error


def place(model: Model, device: torch.device) -> Model:
    """The model on the device; on CUDA with its weights in channels_last_3d and its layers in their forms for CUDA.

    Takes plain and folded models. Names, parameters and results stay.
    """
    if device.type != "cuda":
        return model.to(device)
    return adapt(model.to(device, memory_format=torch.channels_last_3d))  # type: ignore[call-overload]


def adapt(model: Model) -> Model:
    """The model, each layer that has another form for CUDA in that; back on a CPU it computes as before."""
    with_triton = importlib.util.find_spec("triton") is not None  # not there on every system
    forms = FORMS | TRITON_FORMS if with_triton else FORMS
    for module in model.modules():
        # The class alone: parameters stay the objects that an optimizer holds. By exact type: a Classifier is a
        # Convolution too, and would lose its fp32.
        module.__class__ = forms.get(type(module), type(module))
    return model


def synchronise_batch_norm(model: Model) -> Model:
    """The model with batch norm over the clips of all workers, its parameters, names and constants as they are.

    torch's own conversion drops the constant ones that stand for a missing gamma, and without a weight its batch norm
    gives the bias no gradient.
    """
    for name, child in model.named_children():
        norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        setattr(model, name, _synchronised(child) if norm else synchronise_batch_norm(child))
    return model


def _synchronised(norm: nn.Module) -> nn.SyncBatchNorm:
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    synchronised = nn.SyncBatchNorm(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    if not isinstance(norm.weight, nn.Parameter):
        # Makes room for the constant ones, which come with the buffers.
        del synchronised.weight
    for name, parameter in norm.named_parameters(recurse=False):
        synchronised.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        synchronised.register_buffer(name, buffer, persistent=name not in norm._non_persistent_buffers_set)
    return synchronised.train(norm.training)


class CudaConvolution(Convolution):
    """A convolution of the clip's two or three channels on tensor cores."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x is still float32 here, and what is done by hand below is not cast by it.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if x.is_cuda and dtype in HALVES and self.weight.shape[1] < FEW_CHANNELS:
            return convolve_unfolded(x.to(dtype), self.weight, self.bias, self.stride)
        return super().forward(x)


class CudaFoldedUnit(FoldedUnit):
    """A folded unit whose convolution of the clip is on tensor cores."""

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.bias).relu_() if x.is_cuda else super().forward(x)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        few = self.dtype in HALVES and self.weight.shape[1] < FEW_CHANNELS
        convolve = convolve_unfolded if few else convolve_plain
        return convolve(x.to(self.dtype), self.weight, bias, self.stride)


class TritonFoldedUnit(CudaFoldedUnit):
    """A folded unit that adds the bias and takes ReLU in one pass; a compiler does that by itself."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fits(x, self.dtype) or torch.compiler.is_compiling():
            return super().forward(x)
        # Here and below, not at the top: the CPU builds of torch come without Triton.
        from models import triton_kernels

        y = self._convolve(x, None).contiguous(memory_format=torch.channels_last_3d)
        return triton_kernels.bias_relu_(y, self.bias)


class TritonMaxPool(MaxPool):
    """A max-pool by Triton; PyTorch's kernels for channels_last_3d took a quarter of I3D's step."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fits(x, x.dtype) or math.prod(self.kernel) > MAX_WINDOW:
            return super().forward(x)
        return max_pool(x, self.kernel, self.stride)


class TritonConvUnit(ConvUnit):
    """Convolution, then batch norm and ReLU in one: two passes less over each activation, and three less backward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        # A compiler fuses them by itself, and so does folding. One value in a channel has no variance: refused there.
        # SyncBatchNorm is of another type, and is left alone: its statistics span the workers.
        fuses = self.bn.training and type(self.bn) is BatchNorm and not torch.compiler.is_compiling()
        if not (fuses and _fits(y, y.dtype) and y.numel() > y.shape[1]):
            return nn.functional.relu(self.bn(y), inplace=True)
        return norm_relu(y, self.bn)


FORMS: dict[type[nn.Module], type[nn.Module]] = {Convolution: CudaConvolution, FoldedUnit: CudaFoldedUnit}
TRITON_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    ConvUnit: TritonConvUnit,
    FoldedUnit: TritonFoldedUnit,
    MaxPool: TritonMaxPool,
}


def _fits(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take x: they count the elements of one clip, and the clips, in few bits."""
    return x.is_cuda and dtype in DTYPES.values() and 0 < len(x) < 2**16 and x.numel() // len(x) < 2**31


def convolve_plain(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Extent) -> Tensor:
    """SAME convolution (B, out, …) of (B, in, T, H, W) by cuDNN, or by a matrix product where it is 1×1×1."""
    kernel = weight.shape[2], weight.shape[3], weight.shape[4]
    if kernel == stride == (1, 1, 1):
        return nn.functional.linear(x.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
    x, padding = pad_for_convolution(x, kernel, stride)
    return nn.functional.conv3d(x, weight, bias, stride, padding)


def convolve_unfolded(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Extent) -> Tensor:
    """The same SAME convolution of few channels C as one of C · k, k ≥ the kernel's width, whose kernel is 1 wide.

    The k columns that an output sees become channels: they are neighbours in memory. k is rounded up to where C · k is
    a multiple of 8, with weights of zero. Exact, gradients included; the stored weights stay as they are. Zeros for
    channels up to 8 would be simpler, and 5 products of 8 with nothing.
    """
    channels, width = weight.shape[1], weight.shape[4]
    # conv1 is 7 wide: 8 columns, that is 24 channels of RGB, 16 of flow.
    columns = next(n for n in range(width, width + WHOLE_CHANNELS) if n * channels % WHOLE_CHANNELS == 0)
    pads = _pads(x, weight.shape[2:], stride)
    pads[2] = (pads[2][0], pads[2][1] + columns - width)
    windows = nn.functional.pad(x, pad_argument(pads)).unfold(4, columns, stride[2])  # (B, C, T, H, W', columns)
    rows = windows.permute(0, 2, 3, 4, 5, 1).flatten(4)  # (B, T, H, W', columns · C)
    # (out, columns · C, t, h, 1): the channels in the order of the rows'.
    wide = nn.functional.pad(weight, (0, columns - width)).permute(0, 4, 1, 2, 3).flatten(1, 2).unsqueeze(4)
    wide = wide.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
    bias = None if bias is None else bias.to(x.dtype)
    # Stride 1 along the width: unfold has taken it already.
    return nn.functional.conv3d(rows.permute(0, 4, 1, 2, 3), wide, bias, (stride[0], stride[1], 1))


def _pads(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    return [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]


def max_pool(x: Tensor, kernel: Extent, stride: Extent) -> Tensor:
    """SAME max-pool of (B, C, T, H, W) by Triton; of equal values the first has the gradient, as in PyTorch."""
    keep = x.requires_grad and torch.is_grad_enabled()
    return _max_pool(x, list(kernel), list(stride), keep)[0]


@torch.library.custom_op("two_stream_i3d::max_pool", mutates_args=())
def _max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], keep: bool) -> tuple[Tensor, Tensor]:
    """The pool, and for its gradient where in its window each maximum was (empty without `keep`).

    A custom operation, because torch.compile then takes it as it is and not PyTorch's kernels.
    """
    from models import triton_kernels

    y, places = _empty_pool(x, kernel, stride, keep)
    before = [before for before, _ in _pads(x, kernel, stride)]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    triton_kernels.pool(x, y, places if keep else None, kernel, stride, before)
    return y, places


# The real operation allocates by it too, so the shapes are written once.
@_max_pool.register_fake
def _empty_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], keep: bool) -> tuple[Tensor, Tensor]:
    size = [-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)]
    places = x.new_empty([len(x), *size, x.shape[1]] if keep else [0], dtype=torch.uint8)
    return _empty_clips(x, size), places


def _empty_clips(like: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, *size) in channels_last_3d."""
    shape = (*like.shape[:2], *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


@torch.library.custom_op("two_stream_i3d::max_pool_gradient", mutates_args=())
def _max_pool_gradient(
    dy: Tensor, places: Tensor, kernel: Sequence[int], stride: Sequence[int], size: Sequence[int]
) -> Tensor:
    from models import triton_kernels

    dx = _empty_clips(dy, size)
    before = [before for before, _ in _pads(dx, kernel, stride)]
    dy = dy.contiguous(memory_format=torch.channels_last_3d)
    triton_kernels.pool_gradient(dy, places, dx, kernel, stride, before)
    return dx


@_max_pool_gradient.register_fake
def _empty_gradient(
    dy: Tensor, places: Tensor, kernel: Sequence[int], stride: Sequence[int], size: Sequence[int]
) -> Tensor:
    return _empty_clips(dy, size)


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.kernel, ctx.stride, _ = inputs
    ctx.size = list(x.shape[2:])
    # Neither x nor y: a byte for each output says all that the gradient needs.
    ctx.save_for_backward(output[1])


def _gather_gradient(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _max_pool_gradient(dy, *ctx.saved_tensors, ctx.kernel, ctx.stride, ctx.size), None, None, None


_max_pool.register_autograd(_gather_gradient, setup_context=_keep_places)


def norm_relu(x: Tensor, norm: BatchNorm) -> Tensor:
    """What `norm` and then ReLU give in training, by Triton; updates the running statistics."""
    assert norm.num_batches_tracked is not None
    # The forward of PyTorch's module, which would count, is passed by.
    norm.num_batches_tracked.add_(1)
    return _NormRelu.apply(x, norm.weight, norm.bias, norm)


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, norm: BatchNorm) -> Tensor:
        from models import triton_kernels

        assert norm.momentum is not None
        x = x.contiguous(memory_format=torch.channels_last_3d)
        # With four dimensions, as which the same memory can be seen, PyTorch has a kernel for channels that come last.
        stats = torch.batch_norm_update_stats(x.flatten(2, 3), norm.running_mean, norm.running_var, norm.momentum)
        # Not y: where ReLU let pass follows from x, which batch norm needs anyway.
        ctx.save_for_backward(x, *stats, gamma, beta)
        ctx.eps = norm.eps
        return triton_kernels.norm_relu(x, *stats, gamma, beta, norm.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from models import triton_kernels

        dy = gradients[0].contiguous(memory_format=torch.channels_last_3d)
        x, mean, variance, gamma, beta = ctx.saved_tensors
        dx, dbeta, along = triton_kernels.norm_relu_gradient(dy, x, mean, variance, gamma, beta, ctx.eps)
        return dx, along / (variance + ctx.eps).sqrt() if ctx.needs_input_grad[1] else None, dbeta, None
