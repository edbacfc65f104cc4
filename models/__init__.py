"""The five networks that the paper compares, by name; torch only, no data and no cluster.

model = models.build("i3d", num_classes=400, stream="flow")
logits = model(torch.zeros(1, 2, 64, 224, 224))
model.contract.train.streams["flow"].num_frames   # 64: what a loader must deliver
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from models.c3d import C3D, C3DConfig
from models.contract import InputContract, ModelConfig, VideoModel
from models.convnet_lstm import ConvNetLSTM, ConvNetLSTMConfig
from models.fused_two_stream import FusedTwoStream, FusedTwoStreamConfig
from models.i3d import I3D, I3DConfig
from models.two_stream import TwoStream, TwoStreamConfig

CONFIGS: dict[str, type[ModelConfig]] = {
    "convnet_lstm": ConvNetLSTMConfig,
    "c3d": C3DConfig,
    "two_stream": TwoStreamConfig,
    "fused_two_stream": FusedTwoStreamConfig,
    "i3d": I3DConfig,
}
NETWORKS: dict[type[ModelConfig], Callable[..., VideoModel]] = {
    ConvNetLSTMConfig: ConvNetLSTM,
    C3DConfig: C3D,
    TwoStreamConfig: TwoStream,
    FusedTwoStreamConfig: FusedTwoStream,
    I3DConfig: I3D,
}


def configure(
    name: str, *, num_classes: int, stream: str | None = None, width: float = 1.0, **settings: object
) -> ModelConfig:
    """The settings of the model `name`, checked; no tensor is made. Lists (from JSON) are taken as tuples.

    Raises ValueError for an unknown name or setting, listing the known ones, and for settings that do not fit.
    """
    known = setting_names(name)
    if stream is not None:
        settings["stream"] = stream
    if unknown := settings.keys() - known:
        raise ValueError(f"{name} has no settings {sorted(unknown)}; it has {', '.join(sorted(known))}.")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return CONFIGS[name](num_classes=num_classes, width=width, **plain)  # type: ignore[arg-type]


def setting_names(name: str) -> set[str]:
    """The settings that the model `name` has. Raises ValueError for an unknown name."""
    if name not in CONFIGS:
        raise ValueError(f"No model is called {name!r}; choose one of {', '.join(CONFIGS)}.")
    return {field.name for field in fields(CONFIGS[name])}


def build(
    name: str, *, num_classes: int, stream: str | None = None, width: float = 1.0, **settings: object
) -> VideoModel:
    """A new model by name, with freshly drawn weights; `settings` are fields of its config (see `configure`)."""
    return build_from(configure(name, num_classes=num_classes, stream=stream, width=width, **settings))


def build_from(config: ModelConfig) -> VideoModel:
    """A new model from its settings."""
    return NETWORKS[type(config)](config)


def contract_of(config: ModelConfig) -> InputContract:
    """What the model of these settings asks of the data; no weight is allocated."""
    with torch.device("meta"):
        return build_from(config).contract


def name_of(config: ModelConfig) -> str:
    """The name under which `build` makes this config's model."""
    return next(name for name, config_type in CONFIGS.items() if config_type is type(config))


def clip_scores(logits: Tensor) -> Tensor:
    """A model's output as one row of logits for each clip, (B, num_classes): of (B, T, num_classes) the last step."""
    return logits if logits.ndim == 2 else logits[:, -1]


@torch.no_grad()
def video_scores(model: VideoModel, clips: Mapping[str, Tensor], *, batch_size: int = 16) -> Tensor:
    """Logits (num_classes,) float32 of a video from its clips (N, C, T, H, W) by stream: the mean over the N."""
    count = len(next(iter(clips.values())))
    scores = [
        clip_scores(model({stream: views[first : first + batch_size] for stream, views in clips.items()})).float()
        for first in range(0, count, batch_size)
    ]
    return torch.cat(scores).mean(dim=0)


def cross_entropies(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Each clip's cross-entropy (B,) with int64 labels (B,), the mean over its time steps where it has several."""
    steps = logits.shape[1] if logits.ndim == 3 else 1
    rows, targets = logits.flatten(0, -2).float(), labels.repeat_interleave(steps)
    losses = nn.functional.cross_entropy(rows, targets, label_smoothing=label_smoothing, reduction="none")
    return losses.view(len(labels), steps).mean(dim=1)
