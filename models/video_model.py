"""What every network is to those who train it and use it, and how it takes its clips."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.input_spec import CHANNELS, InputSpec, ModelConfig

Clips = Tensor | Mapping[str, Tensor]


class VideoModel(nn.Module):
    """A module that knows its settings and what it asks of the data; `forward` takes `Clips` and returns logits."""

    config: ModelConfig

    @property
    def input_spec(self) -> InputSpec:
        raise NotImplementedError


def stream_of(clips: Clips, stream: str) -> Tensor:
    """One stream's clip (B, C, T, H, W), checked for channels and dtype; a ValueError says what is wrong."""
    if not isinstance(clips, Tensor):
        if stream not in clips:
            raise ValueError(f"The clips hold the streams {sorted(clips)}; this model needs {stream!r}.")
        clips = clips[stream]
    if clips.ndim != 5 or clips.shape[1] != CHANNELS[stream]:
        shape = tuple(clips.shape)
        raise ValueError(f"A {stream} clip is (B, {CHANNELS[stream]}, T, H, W); got the shape {shape}.")
    if not clips.is_floating_point():
        raise ValueError(f"A {stream} clip holds floats in [-1, 1]; got {clips.dtype}: scale it first.")
    return clips
