"""What a model costs: trainable parameters and floating-point operations, counted without memory or time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import build_from
from models.input_spec import ClipSampling, ModelConfig


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_flops(config: ModelConfig, *, test: bool = False) -> int:
    """Floating-point operations (two per multiply-add) of one forward pass over a training clip, or a test video.

    A test video is all clips of the input spec's test sampling. Counted on the meta device: nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    with torch.device("meta"):
        # eval: batch norm in training refuses the one value a channel that C3D's hidden layers have of one clip.
        model = build_from(config).eval()
        sampling = model.input_spec.test if test else model.input_spec.train
        clips = blank_clips(sampling, model.input_spec.size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(clips)
    return counter.get_total_flops() * sampling.num_clips


def blank_clips(sampling: ClipSampling, size: int, *, batch: int = 1) -> dict[str, Tensor]:
    """Zero clips (batch, C, T, size, size) of every stream, as a loader that obeys the input spec would deliver."""
    return {
        stream: torch.zeros(batch, frames.channels, frames.num_frames, size, size)
        for stream, frames in sampling.streams.items()
    }
