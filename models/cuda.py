"""All that is done for CUDA alone; the networks' own files know nothing of it.

    cuda.set_up(device, "bf16", training=True)    once in a process: TensorFloat-32, cuDNN's search, one check
    model = cuda.place(model, device)             layers that compute the same in another way
    step = cuda.record(model, clips, "bf16")      a training step's launches, recorded

On a CPU the first two do nothing. A model that was moved by `model.to("cuda")` alone gives the same results, slower.

* A convolution of two or three channels in half precision goes to a kernel without tensor cores, which took a third
  of I3D's step. Blocks of its clip become channels first, 16 or 24, and its strides 1.
* Max-pools, and batch norm with ReLU, are Triton kernels (`models.triton_kernels`); without Triton, PyTorch's.

What these bring is in docs/measurements.md.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
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
from models.video_model import VideoModel

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
    # At test each length of video is a shape of its own; in half precision the search found nothing quicker (I3D on an
    # H100: 98 ms a step without, 100 ms with) and takes 20 s.
    torch.backends.cudnn.benchmark = training and precision == "fp32"
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
    forms = FORMS | TRITON_FORMS if _has_triton() else FORMS
    for module in model.modules():
        # The class alone: parameters stay the objects that an optimizer holds. By exact type: a Classifier is a
        # Convolution too, and would lose its fp32.
        module.__class__ = forms.get(type(module), type(module))
    return model


@cache
def _has_triton() -> bool:
    """Whether Triton is installed, as it is not on every system."""
    return importlib.util.find_spec("triton") is not None


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; on CUDA copied beside what the device still has to compute, and nobody waits.

    From memory that is not page-locked, or on the stream that computes, the copy would wait for all that came before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    stream, computing = _copying_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        moved = tensor.pin_memory().to(device, non_blocking=True)
    computing.wait_stream(stream)
    moved.record_stream(computing)  # its memory is not given away before the step that reads it is over
    return moved


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def can_record(device: torch.device) -> bool:
    """Whether `record` is for this device."""
    return device.type == "cuda"


def record(model: VideoModel, clips: Mapping[str, Tensor], precision: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The model's forward and backward pass in training on clips like these, recorded as CUDA graphs.

    What it returns takes clips of these shapes and gives their logits, which hold until it is called again, and so do
    the gradients. The launches of a step, some 2,000, take a CPU longer than a GPU needs to compute them. Weights,
    statistics and random numbers are as before. Raises RuntimeError where something cannot be recorded.
    """
    streams = list(clips)
    before = [buffer.clone() for buffer in model.buffers()]
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        # PyTorch's own recording warms up on another stream, and then warns of it.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    device = next(iter(clips.values())).device
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=False),
        ):
            call: Any = torch.cuda.make_graphed_callables(_Positional(model, streams), tuple(clips.values()))
    finally:
        for buffer, was in zip(model.buffers(), before, strict=True):
            buffer.copy_(was)  # batch norm has seen the clips of the warm-up

    def replay(clips: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = call(*(clips[stream] for stream in streams))
        return logits

    return replay


class _Positional(nn.Module):
    """A model that takes its streams one after another, as what records wants it."""

    def __init__(self, model: VideoModel, streams: list[str]) -> None:
        super().__init__()
        self.model, self.streams = model, streams

    def forward(self, *clips: Tensor) -> Tensor:
        logits: Tensor = self.model(dict(zip(self.streams, clips, strict=True)))
        return logits


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
            return convolve_clip(x, self.weight, self.bias, self.stride, dtype)
        return super().forward(x)


class CudaFoldedUnit(FoldedUnit):
    """A folded unit whose convolution of the clip is on tensor cores."""

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.bias).relu_() if x.is_cuda else super().forward(x)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        few = self.dtype in HALVES and self.weight.shape[1] < FEW_CHANNELS
        if few:
            return convolve_clip(x, self.weight, bias, self.stride, self.dtype)
        return convolve_plain(x.to(self.dtype), self.weight, bias, self.stride)


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


def convolve_clip(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Extent, dtype: torch.dtype | None = None
) -> Tensor:
    """The SAME convolution of few channels in `dtype`, x's own if None, as one of many with stride 1.

    Blocks of as many elements as the strides become channels, and zeros fill these up to a multiple of 8: 24 for an RGB
    clip under strides of 2, with a kernel of 4 in place of 7. Exact, gradients included; the stored weights stay as
    they are. As three channels cuDNN computes it without tensor cores; with zeros up to 8 channels, or with windows
    along the width as channels, it took 2.6 and 1.5 times as long (benchmarks/gpu_networks.py, H100).
    """
    dtype = dtype or x.dtype
    kernel = weight.shape[2], weight.shape[3], weight.shape[4]
    # Taps of a kernel that is no multiple of its stride are filled up behind.
    taps = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]
    behind = [(0, n * s - k) for n, s, k in zip(taps, stride, kernel, strict=True)]
    wide = _to_depth(nn.functional.pad(weight, pad_argument(behind)), stride)
    wide = wide.to(dtype, memory_format=torch.channels_last_3d)
    if bias is not None:
        bias = bias.to(dtype)
    return nn.functional.conv3d(_blocks_of(x, kernel, stride, taps, dtype), wide, bias)


def _blocks_of(x: Tensor, kernel: Extent, stride: Extent, taps: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A clip, padded as SAME says, as blocks of `stride` elements: (B, D, T', H', W') channels_last_3d."""
    outputs = [-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)]
    size = [n + k - 1 for n, k in zip(outputs, taps, strict=True)]
    before = [before for before, _ in _pads(x, kernel, stride)]
    if _fits(x, dtype) and not x.requires_grad and not torch.compiler.is_compiling() and _has_triton():
        from models import triton_kernels

        depth = _whole(x.shape[1] * math.prod(stride))
        shape = (len(x), depth, *size)
        blocks = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)
        triton_kernels.space_to_depth(x, blocks, stride, before)
        return blocks
    pads = [(b, n * s - length - b) for b, n, s, length in zip(before, size, stride, x.shape[2:], strict=True)]
    blocks = _to_depth(nn.functional.pad(x.to(dtype), pad_argument(pads)), stride)
    return blocks.contiguous(memory_format=torch.channels_last_3d)


def _to_depth(x: Tensor, stride: Extent) -> Tensor:
    """(N, C, T, H, W) to (N, D, T / st, H / sh, W / sw): blocks as channels, c · st · sh · sw of them, then zeros."""
    blocks = x.unflatten(4, (-1, stride[2])).unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    blocks = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return nn.functional.pad(blocks, (0, 0, 0, 0, 0, 0, 0, _whole(blocks.shape[1]) - blocks.shape[1]))


def _whole(channels: int) -> int:
    return -(-channels // WHOLE_CHANNELS) * WHOLE_CHANNELS


def _pads(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    return [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]


def max_pool(x: Tensor, kernel: Extent, stride: Extent) -> Tensor:
    """SAME max-pool of (B, C, T, H, W) by Triton; of equal values the first has the gradient, as in PyTorch."""
    keep = x.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return _max_pool(x, list(kernel), list(stride), keep)[0]
    # The same without the bookkeeping of a custom operation, a tenth of a millisecond each time.
    return _MaxPool.apply(x, kernel, stride) if keep else _pool(x, kernel, stride, False)[0]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Extent, stride: Extent) -> Tensor:
        output = _pool(x, kernel, stride, True)
        _keep_places(ctx, (x, kernel, stride, True), output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _pool_gradient(gradients[0], places, ctx.kernel, ctx.stride, ctx.size), None, None


@torch.library.custom_op("two_stream_i3d::max_pool", mutates_args=())
def _max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], keep: bool) -> tuple[Tensor, Tensor]:
    """`_pool` as a custom operation, which torch.compile takes as it is, and not PyTorch's kernels in its place."""
    return _pool(x, kernel, stride, keep)


def _pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], keep: bool) -> tuple[Tensor, Tensor]:
    """The pool, and for its gradient where in its window each maximum was (empty without `keep`)."""
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
    return _pool_gradient(dy, places, kernel, stride, size)


def _pool_gradient(
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
    ctx.set_materialize_grads(False)  # of the places, which have none
    # Neither x nor y: a byte for each output says all that the gradient needs.
    ctx.save_for_backward(output[1])


def _gather_gradient(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _max_pool_gradient(dy, *ctx.saved_tensors, ctx.kernel, ctx.stride, ctx.size), None, None, None


_max_pool.register_autograd(_gather_gradient, setup_context=_keep_places)


def norm_relu(x: Tensor, norm: BatchNorm) -> Tensor:
    """What `norm` and then ReLU give in training, by Triton; updates the running statistics."""
    return _NormRelu.apply(x, norm.weight, norm.bias, norm)


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, norm: BatchNorm) -> Tensor:
        from models import triton_kernels

        assert norm.momentum is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        x = x.contiguous(memory_format=torch.channels_last_3d)
        # It also counts the batch, as the forward of PyTorch's module would, which is passed by.
        stats = triton_kernels.update_statistics(
            x, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
        )
        # Not y: where ReLU let pass follows from x, which batch norm needs anyway.
        ctx.save_for_backward(x, *stats, gamma, beta)
        ctx.eps = norm.eps
        return triton_kernels.norm_relu(x, *stats, gamma, beta, norm.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from models import triton_kernels

        x, mean, variance, gamma, beta = ctx.saved_tensors
        dx, dbeta, along = triton_kernels.norm_relu_gradient(gradients[0], x, mean, variance, gamma, beta, ctx.eps)
        return dx, along / (variance + ctx.eps).sqrt() if ctx.needs_input_grad[1] else None, dbeta, None
