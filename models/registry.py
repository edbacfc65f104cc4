"""The five networks by name: their settings, checked, and the models made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch

from models.c3d import C3D, C3DConfig
from models.convnet_lstm import ConvNetLSTM, ConvNetLSTMConfig
from models.fused_two_stream import FusedTwoStream, FusedTwoStreamConfig
from models.i3d import I3D, I3DConfig
from models.input_spec import InputSpec, ModelConfig
from models.two_stream import TwoStream, TwoStreamConfig
from models.video_model import VideoModel

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


def input_spec_of(config: ModelConfig) -> InputSpec:
    """What the model of these settings asks of the data; no weight is allocated."""
    with torch.device("meta"):
        return build_from(config).input_spec


def name_of(config: ModelConfig) -> str:
    """The name under which `build` makes this config's model."""
    return next(name for name, config_type in CONFIGS.items() if config_type is type(config))
