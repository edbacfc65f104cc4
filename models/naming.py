"""How files that people already have spell the layers of Inception-V1, and how their tensors lie.

Five spellings: TF-slim and torchvision for 2-D weights; DeepMind's TensorFlow checkpoints and two popular PyTorch ports
(piergiaj, hassony2) for I3D's. One function turns any of them into our names, and says at once all that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
GAMMA = "bn.weight"
FIRST_CONV = "Conv3d_1a_7x7.conv.weight"


@dataclass(frozen=True, kw_only=True)
class Naming:
    """One spelling: `unit` turns a unit's path in our trunk into the file's, `parts` spells the tensors within it.

    `logits` spells the classifier where it is wanted; `weight_axes` permutes a convolution's axes into PyTorch's
    order; names that match `ignored` are expected in the file and not needed.
    """

    unit: Callable[[str], str]
    parts: Mapping[str, str]
    logits: Mapping[str, str] = field(default_factory=dict)
    weight_axes: tuple[int, ...] | None = None
    ignored: str = r"num_batches_tracked$"

    def spell(self, name: str) -> str:
        """The file's name of our tensor `Mixed_3b.Branch_0.Conv3d_0a_1x1.conv.weight` or `logits.weight`."""
        if name in self.logits:
            return self.logits[name]
        unit, layer, tensor = name.rsplit(".", 2)
        return self.unit(unit) + self.parts[f"{layer}.{tensor}"]


def recognize(tensors: Tensors, names: Iterable[str], namings: Sequence[Naming]) -> Naming:
    """The naming under which most of our `names` are found in a file; ValueError where none is."""
    wanted = list(names)
    counts = {index: sum(naming.spell(name) in tensors for name in wanted) for index, naming in enumerate(namings)}
    # Most, not all: what a file lacks is then listed under the spelling that was meant.
    best = max(counts, key=counts.__getitem__)
    if not counts[best]:
        known = [naming.spell(wanted[0]) for naming in namings]
        raise ValueError(f"Unknown tensor names {sorted(tensors)[:3]}; expected names such as {' or '.join(known)}.")
    return namings[best]


def shapes_with_gamma(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The shapes of a model's tensors and of the gamma of every batch norm, also where the model leaves it out."""
    return {**shapes, **{n.removesuffix("bias") + "weight": s for n, s in shapes.items() if n.endswith("bn.bias")}}


def without_gamma(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors without batch norm's gamma, for a model that has none. ValueError unless all gammas are one."""
    if scaled := scaled_by_gamma(tensors):
        raise ValueError(
            f"These weights scale their batch norm (gamma is not 1 in {', '.join(scaled)}); build the model with "
            "bn_gamma=True."
        )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(GAMMA)}


def scaled_by_gamma(tensors: Tensors) -> list[str]:
    """The names of the gammas that are not all ones."""
    return [name for name, gamma in tensors.items() if name.endswith(GAMMA) and not torch.all(gamma == 1)]


def translate(tensors: Tensors, naming: Naming, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a file under our names and in PyTorch's layout, for the names and shapes that are wanted.

    Gamma is all ones where the file has none. Raises one ValueError that lists every missing, extra and mis-shaped
    tensor.
    """
    spelled = {name: naming.spell(name) for name in shapes if naming.spell(name) in tensors}
    translated = {name: _in_our_layout(tensors[source], name, naming) for name, source in spelled.items()}
    translated |= {name: torch.ones(shapes[name]) for name in shapes.keys() - spelled.keys() if name.endswith(GAMMA)}
    problems = _differences(translated, shapes, naming)
    extra = sorted(name for name in tensors.keys() - set(spelled.values()) if not re.search(naming.ignored, name))
    if problems or extra:
        problems += [f"extra: {name}" for name in extra]
        raise ValueError("The weights do not fit this model:\n  " + "\n  ".join(problems))
    return translated


def _in_our_layout(tensor: Tensor, name: str, naming: Naming) -> Tensor:
    if not name.endswith(("conv.weight", "logits.weight")):
        return tensor.flatten()  # Sonnet keeps batch norm as [1, 1, 1, 1, C]
    # Of another rank: it is reported as mis-shaped, where permute would raise.
    if naming.weight_axes is None or tensor.ndim != len(naming.weight_axes):
        return tensor
    return tensor.permute(naming.weight_axes)


def _differences(translated: Tensors, shapes: Mapping[str, torch.Size], naming: Naming) -> list[str]:
    missing = [f"missing: {naming.spell(name)} (for {name})" for name in shapes if name not in translated]
    wrong = [
        f"shape: {naming.spell(name)} gives {tuple(tensor.shape)} for {name}, which is {tuple(shapes[name])}"
        for name, tensor in translated.items()
        if tensor.shape != shapes[name]
    ]
    return missing + wrong


def _slim_unit(unit: str) -> str:
    """Slim's path below its scope. Mixed_5b's second branch is called 0a_3x3 there, a slip that I3D inherited."""
    path = unit.replace("Mixed_5b.Branch_2.Conv3d_0b_3x3", "Mixed_5b.Branch_2.Conv3d_0a_3x3")
    return path.replace(".", "/") + "/"


def _piergiaj_unit(unit: str) -> str:
    return re.sub(r"\.Branch_(\d)\.Conv3d_0([ab])_\dx\d$", _piergiaj_branch, unit) + "."


def _piergiaj_branch(match: re.Match[str]) -> str:
    branch, place = match.groups()
    return f".b{branch}" if branch == "0" else f".b{branch}{place}"  # branch 0 has one unit, and no letter


def _indexed_branch(unit: str) -> str:
    """Mixed_3b.Branch_1.Conv3d_0b_3x3 as Mixed_3b.Branch_1.1: units numbered within their branch; branch 0 has one."""
    unit = re.sub(r"\.Conv3d_0([ab])_\dx\d$", lambda match: f".{'ab'.index(match[1])}", unit)
    return unit.replace("Branch_0.0", "Branch_0")


def _hassony2_unit(unit: str) -> str:
    return _indexed_branch(unit).replace("Mixed", "mixed").replace("Branch", "branch").replace("Conv3d", "conv3d") + "."


TORCHVISION_BLOCKS = {
    **{"Conv3d_1a_7x7": "conv1", "Conv3d_2b_1x1": "conv2", "Conv3d_2c_3x3": "conv3"},
    **{"Mixed_3b": "inception3a", "Mixed_3c": "inception3b", "Mixed_4b": "inception4a", "Mixed_4c": "inception4b"},
    **{"Mixed_4d": "inception4c", "Mixed_4e": "inception4d", "Mixed_4f": "inception4e"},
    **{"Mixed_5b": "inception5a", "Mixed_5c": "inception5b"},
}


def _torchvision_unit(unit: str) -> str:
    block, *branch = _indexed_branch(unit).split(".", 1)
    path = ".".join([TORCHVISION_BLOCKS[block], *branch])
    # torchvision counts branches from 1.
    return re.sub(r"Branch_(\d)", lambda match: f"branch{int(match[1]) + 1}", path) + "."


def _torch_parts(conv: str, norm: str) -> dict[str, str]:
    stored = ("weight", "bias", "running_mean", "running_var")
    return {"conv.weight": f"{conv}.weight", **{f"bn.{name}": f"{norm}.{name}" for name in stored}}


def _tensorflow_parts(weight: str, norm: str) -> dict[str, str]:
    stored = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    return {"conv.weight": weight, **{f"bn.{ours}": f"{norm}/{theirs}" for ours, theirs in stored.items()}}


TORCHVISION = Naming(
    unit=_torchvision_unit, parts=_torch_parts("conv", "bn"), ignored=r"num_batches_tracked$|^fc\.|^aux[12]\."
)
SLIM = Naming(
    unit=lambda unit: "InceptionV1/" + _slim_unit(unit).replace("Conv3d", "Conv2d"),
    parts=_tensorflow_parts("weights", "BatchNorm"),
    weight_axes=(3, 2, 0, 1),  # TensorFlow keeps (h, w, in, out)
    ignored=r"^InceptionV1/Logits/|^global_step$",
)
DEEPMIND = Naming(
    unit=_slim_unit,
    parts=_tensorflow_parts("conv_3d/w", "batch_norm"),
    logits={"logits.weight": "Logits/Conv3d_0c_1x1/conv_3d/w", "logits.bias": "Logits/Conv3d_0c_1x1/conv_3d/b"},
    weight_axes=(4, 3, 0, 1, 2),  # TensorFlow keeps (t, h, w, in, out)
    # The checkpoints of Kinetics-600 hold the optimizer's slots too.
    ignored=r"/Momentum$|^global_step$",
)
PIERGIAJ = Naming(
    unit=_piergiaj_unit,
    parts=_torch_parts("conv3d", "bn"),
    logits={"logits.weight": "logits.conv3d.weight", "logits.bias": "logits.conv3d.bias"},
)
HASSONY2 = Naming(
    unit=_hassony2_unit,
    parts=_torch_parts("conv3d", "batch3d"),
    logits={"logits.weight": "conv3d_0c_1x1.conv3d.weight", "logits.bias": "conv3d_0c_1x1.conv3d.bias"},
)
