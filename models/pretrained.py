"""Released I3D weights into our I3D: DeepMind's TensorFlow checkpoints and the PyTorch files converted from them.

With DeepMind's files and its 79-frame sample the published scores (playing cricket 41.8137, norm 138.468658) come from

    from models.pretrained import load_released
    logits = sum(load_released(f"data/checkpoints/{kind}_imagenet", stream=kind).eval()(clips[kind]) for kind in clips)

where clips["rgb"] and clips["flow"] are the sample's .npy files as float tensors, permuted to (1, C, 79, 224, 224).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.i3d import I3D, I3DConfig
from models.input_spec import CHANNELS, Stream
from models.naming import (
    DEEPMIND,
    FIRST_CONV,
    HASSONY2,
    PIERGIAJ,
    Naming,
    Tensors,
    recognize,
    scaled_by_gamma,
    shapes_with_gamma,
    translate,
    without_gamma,
)
from models.tensorflow_checkpoint import find_prefix, read_tensors
from models.torchscript import is_torchscript

NAMINGS = (DEEPMIND, PIERGIAJ, HASSONY2)


def load_released(path: str | Path, *, stream: str | None = None, **settings: object) -> I3D:
    """An I3D with released weights; stream and number of classes are those of the file.

    `path` is a TensorFlow checkpoint (its prefix, its .index file, or a directory with one; Kinetics-400 or -600) or a
    PyTorch state dict (piergiaj's rgb_imagenet.pt, hassony2's model_rgb.pth). `settings` are further fields of
    I3DConfig. PyTorch files are read with weights_only: no pickled code is run. Raises ValueError where the file is
    of another stream than asked for, and one that lists every tensor that is missing, extra or mis-shaped.
    """
    return from_tensors(read_released(path), stream=stream, **settings)


def read_released(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a released file under its own names, without the `RGB/inception_i3d/` of TensorFlow's."""
    if prefix := find_prefix(path):
        tensors = read_tensors(prefix)
        # Kinetics-600's checkpoints have no such prefix.
        return {re.sub(r"^(RGB|Flow)/inception_i3d/", "", name): tensor for name, tensor in tensors.items()}
    if not Path(path).is_file():
        raise ValueError(f"{path} is neither a file of PyTorch weights nor a TensorFlow checkpoint (PREFIX.index).")
    # torch.load would warn of it and only then refuse it.
    if is_torchscript(path):
        raise ValueError(f"{path} is a TorchScript file, which is a program, and no state dict: nothing of it is run.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of plain PyTorch weights; what needs pickled code run is not read."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no state dict, a mapping from names to tensors.")
    return dict(state)


def from_tensors(tensors: Tensors, *, stream: str | None = None, **settings: object) -> I3D:
    """An I3D from tensors under any of the released namings; see `load_released`."""
    # Any number of classes will do, and either stream: only the names are looked at.
    naming = recognize(tensors, _shapes(I3DConfig(num_classes=400)), NAMINGS)
    stored = _stream_of(tensors, naming)
    if stream not in (None, stored):
        raise ValueError(f"These are weights of the {stored} stream; asked for was stream={stream!r}.")
    bias = tensors.get(naming.logits["logits.bias"])
    num_classes = 400 if bias is None else bias.numel()  # a missing bias is reported by translate
    # With gamma first: whether the file's are all ones is known only once they are read.
    config = I3DConfig(num_classes=num_classes, stream=stored, **{"bn_gamma": True, **settings})  # type: ignore[arg-type]
    state = translate(tensors, naming, shapes_with_gamma(_shapes(config)))
    if not config.bn_gamma or ("bn_gamma" not in settings and not scaled_by_gamma(state)):
        config, state = replace(config, bn_gamma=False), without_gamma(state)
    model = I3D(config)
    # Not every file has the batch counters, and load_state_dict is to be strict about all else.
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(counters | {_in_i3d(name): tensor for name, tensor in state.items()})
    return model


def _stream_of(tensors: Tensors, naming: Naming) -> Stream:
    """The stream whose channels the first convolution has; rgb where that is missing, which `translate` reports."""
    weight = tensors.get(naming.spell(FIRST_CONV))
    channels = None if weight is None else weight.shape[1 if naming.weight_axes is None else naming.weight_axes[1]]
    return "flow" if channels == CHANNELS["flow"] else "rgb"


def _shapes(config: I3DConfig) -> dict[str, torch.Size]:
    """Names, relative to the trunk, and shapes of the tensors of an I3D; nothing is allocated."""
    with torch.device("meta"):
        state = I3D(config).state_dict()
    return {n.removeprefix("trunk."): t.shape for n, t in state.items() if not n.endswith("num_batches_tracked")}


def _in_i3d(name: str) -> str:
    return name if name.startswith("logits.") else f"trunk.{name}"
