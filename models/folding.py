"""A model for inference: batch norm folded into the convolutions, ReLU fused, weights packed once.

On a CPU every convolution then runs in oneDNN, also where PyTorch would choose its slower own (batches of one, 1×1×1
kernels with one thread), in float32 or bfloat16. The folded copy gives the same logits but cannot be trained or saved.
For a GPU `models.cuda.place` takes the folded copy further.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.convolution import ConvUnit, pad_for_convolution


def fold_batch_norm(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of a model, on its device and in eval mode, with every conv-BN-ReLU unit folded to `dtype`.

    Inputs stay float32, and so do the classifier and its logits. In bfloat16 the logits differ by about 0.5 %.
    """
    return _fold_children(copy.deepcopy(model).eval(), dtype).requires_grad_(False)


class FoldedUnit(nn.Module):
    """ReLU of one convolution whose weights hold the running statistics of the batch norm that followed."""

    weight: Tensor
    bias: Tensor

    def __init__(self, unit: ConvUnit, dtype: torch.dtype) -> None:
        super().__init__()
        bn = unit.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        # At test batch norm is one scale and one shift a channel, so weights and bias can hold it exactly.
        scale = torch.rsqrt(bn.running_var + bn.eps) * bn.weight
        weight = unit.conv.weight * scale.view(-1, 1, 1, 1, 1)
        self.kernel, self.stride, self.dtype = unit.conv.kernel, unit.conv.stride, dtype
        # Rounded once, after scaling.
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", (bn.bias - bn.running_mean * scale).to(dtype))
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x, padding = pad_for_convolution(x.to(self.dtype), self.kernel, self.stride)
        if not (x.is_cpu and _onednn_takes(self.dtype)):
            return nn.functional.conv3d(x, self.weight, self.bias, self.stride, padding).relu_()
        dilation, groups = (1, 1, 1), 1
        if self.packed is None:  # oneDNN chooses its blocked layout by the input's shape
            self.packed = torch.ops.aten.mkldnn_reorder_conv3d_weight(
                self.weight.to_mkldnn(), padding, self.stride, dilation, groups, x.shape
            )
        # What torch.compile would emit, without its minute and more of compiling: ReLU is done within the convolution.
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, padding, self.stride, dilation, groups, "relu", [], ""
        )


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in `dtype` on this processor: bfloat16 wants AVX-512, and PyTorch's own is slower."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.backends.mkldnn.is_available() and dtype == torch.float32


def _fold_children(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for name, child in module.named_children():
        folded = FoldedUnit(child, dtype) if isinstance(child, ConvUnit) else _fold_children(child, dtype)
        setattr(module, name, folded)
    return module
