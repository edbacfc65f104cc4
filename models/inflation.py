"""2-D Inception-V1 weights into the trunks of a model (Carreira & Zisserman 2017, section 2.4.1).

The file that people have is torchvision's GoogLeNet, ported from TF-slim: it saw images in [-1, 1], the range of
our clips.

`mean` repeats a filter along time and divides by its length, so that a video of one still image gives the image's
activations. This holds where no zero padding in time is seen: inside a layer, or with replicated borders. It does not
hold for the whole network, whose zero padding reaches every step: of 64 equal frames 29 of 32 steps are exact after the
first convolution, none of 8 after Mixed_5c. `center` puts the filter at the middle step and zeros elsewhere; it looks
at single frames to begin with, sees no padding, and the property holds at every step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.inception import InceptionV1
from models.naming import FIRST_CONV, SLIM, TORCHVISION, Tensors, recognize, shapes_with_gamma, translate, without_gamma

Mode = Literal["mean", "center"]


def inflate(model: nn.Module, images: Tensors, *, mode: Mode = "mean") -> None:
    """Sets every Inception trunk of a model from 2-D weights: torchvision GoogLeNet's state dict, or TF-slim's names.

    Framewise trunks get them as they are. A trunk whose input is not RGB gets the first filters averaged over RGB and
    copied to each of its channels. Classifier and auxiliary heads of the file are left out.
    Raises one ValueError listing what is missing, extra or mis-shaped.
    """
    trunks = [module for module in model.modules() if isinstance(module, InceptionV1)]
    if not trunks:
        raise ValueError(f"{type(model).__name__} has no Inception-V1 trunk that 2-D weights could start.")
    for trunk in trunks:
        # Not strict for the batch counters alone; all else was compared, name by name.
        trunk.load_state_dict(inflated_state(trunk, images, mode=mode), strict=False)


def inflated_state(trunk: InceptionV1, images: Tensors, *, mode: Mode = "mean") -> dict[str, Tensor]:
    """The trunk's state dict (without batch counters) from 2-D weights; see `inflate`."""
    if mode not in ("mean", "center"):
        raise ValueError(f"mode is {mode!r}; choose 'mean' or 'center'.")
    state = {name: tensor for name, tensor in trunk.state_dict().items() if not name.endswith("num_batches_tracked")}
    shapes = {name: _image_shape(name, tensor) for name, tensor in state.items()}
    wanted = shapes_with_gamma(shapes)
    flat = translate(images, recognize(images, wanted, (TORCHVISION, SLIM)), wanted)
    # Equal where the trunk has gamma itself. Slim trained without, so ported weights have ones there.
    flat = flat if shapes == wanted else without_gamma(flat)
    flat[FIRST_CONV] = _for_channels(flat[FIRST_CONV], trunk.in_channels)
    return {
        name: inflate_filter(flat[name], tensor.shape[2], mode=mode) if tensor.ndim == 5 else flat[name]
        for name, tensor in state.items()
    }


def inflate_filter(weight: Tensor, length: int, *, mode: Mode = "mean") -> Tensor:
    """A 2-D filter (out, in, h, w) as a 3-D one (out, in, length, h, w); see the module's docstring for the modes."""
    if mode == "mean":
        return weight.unsqueeze(2).repeat(1, 1, length, 1, 1) / length
    inflated = weight.new_zeros(*weight.shape[:2], length, *weight.shape[2:])
    # Of an even kernel the earlier middle: SAME padding lets it see the output's own step.
    inflated[:, :, (length - 1) // 2] = weight
    return inflated


def _image_shape(name: str, tensor: Tensor) -> torch.Size:
    """The 2-D shape of one of the trunk's tensors; the first convolution sees RGB."""
    if tensor.ndim != 5:
        return tensor.shape
    out_channels, in_channels, _, height, width = tensor.shape
    return torch.Size((out_channels, 3 if name == FIRST_CONV else in_channels, height, width))


def _for_channels(weight: Tensor, in_channels: int) -> Tensor:
    """First filters (out, 3, h, w) for another number of input channels: their mean over RGB, copied to each."""
    # The paper does not say how flow starts from RGB; this is what TSN does (Wang et al. 2016).
    return weight if in_channels == 3 else weight.mean(dim=1, keepdim=True).repeat(1, in_channels, 1, 1)
