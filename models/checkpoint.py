"""Our own checkpoints: a directory that says by itself what it holds and how to rebuild it.

    DIR/model.json           format, model name, its settings, classes, flow convention, whatever else was told
    DIR/weights.safetensors  parameters and running statistics, float32, under the model's own names
    DIR/training.pt          optional: optimizer and loop state for resuming; read with weights_only

model.json is written last: a directory without it is not a checkpoint. What is shared has the same content under the
names that Hugging Face's hub looks for, config.json and model.safetensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from models import build, name_of
from models.video_model import VideoModel

FORMAT = 1


class Layout(NamedTuple):
    """What the two files of a checkpoint are called."""

    description: str
    weights: str


OWN = Layout("model.json", "weights.safetensors")
HUB = Layout("config.json", "model.safetensors")
LAYOUTS = (OWN, HUB)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a checkpoint says beside its weights.

    `flow_convention` is how the flow that the model saw was stored (bound, levels, zero code, as the shards say), or
    None for a model that saw none. `clips` is how frames became clips, as told by
    `pipelines.clips.sampling.ClipSettings`. `extra` is free: steps, scores, the run's settings.
    """

    classes: tuple[str, ...]
    flow_convention: Mapping[str, object] | None = None
    clips: Mapping[str, object] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)


def save(
    directory: str | Path,
    model: VideoModel,
    metadata: Metadata,
    *,
    training_state: Mapping[str, object] | None = None,
    layout: Layout = OWN,
) -> None:
    """Writes a checkpoint; the directory is made where it is missing, an older one replaced.

    `training_state` is tensors, numbers and strings in mappings and lists, such as an optimizer's state dict.
    Raises ValueError where the number of class names is not the model's.
    """
    if len(metadata.classes) != model.config.num_classes:
        raise ValueError(
            f"{len(metadata.classes)} class names for a model of {model.config.num_classes} classes; give one each."
        )
    described = {"format": FORMAT, "model": name_of(model.config), "config": asdict(model.config), **asdict(metadata)}
    # Before anything is deleted: what JSON cannot hold raises here, and the older checkpoint stays whole.
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Description first: a save that is cut off must leave no checkpoint. An old training.pt would pass for this one's.
    for name in (layout.description, "training.pt"):
        (directory / name).unlink(missing_ok=True)
    # Convolutions keep their weights in channels_last_3d, which safetensors refuses to write.
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, directory / layout.weights)
    if training_state is not None:
        torch.save(dict(training_state), directory / "training.pt")
    (directory / layout.description).write_text(text, encoding="utf-8")


def load(directory: str | Path, *, device: str = "cpu") -> tuple[VideoModel, Metadata]:
    """The model of a checkpoint, in training mode, and its metadata.

    Raises ValueError where the directory holds no checkpoint, or one of another format.
    """
    layout = next((layout for layout in LAYOUTS if (Path(directory) / layout.description).is_file()), None)
    if layout is None:
        raise ValueError(f"{directory} holds no checkpoint: it has no {OWN.description}.")
    path = Path(directory) / layout.description
    described = json.loads(path.read_text(encoding="utf-8"))
    if described.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {described.get('format')!r}; this version reads {FORMAT}.")
    model = build(described["model"], **described["config"]).to(device)
    model.load_state_dict(load_file(Path(directory) / layout.weights, device=device))
    metadata = {key: described[key] for key in ("flow_convention", "clips", "extra")}
    return model, Metadata(classes=tuple(described["classes"]), **metadata)


def load_training_state(directory: str | Path, *, device: str = "cpu") -> dict[str, object] | None:
    """The training state of a checkpoint, or None where it was saved without.

    Raises ValueError where it is more than tensors, numbers and strings: no pickled code is run.
    """
    path = Path(directory) / "training.pt"
    try:
        return torch.load(path, map_location=device, weights_only=True) if path.is_file() else None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no training state of this project; what needs pickled code run is not read."
        ) from error
