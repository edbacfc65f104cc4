"""Small networks and videos for features, and what a plain loop makes of one."""

from __future__ import annotations

from pathlib import Path

import torch

import models
from models import checkpoint
from models.checkpoint import Metadata
from models.input_spec import STREAMS
from pipelines.clips.sampling import ClipSettings


def save_networks(folder: Path, seed: int = 0, size: int = 32) -> list[str]:
    """Flags that name an I3D of random weights for each stream, which sees 16 frames of so many pixels."""
    flags = []
    for stream in STREAMS:
        torch.manual_seed(seed)
        model = models.build("i3d", num_classes=6, stream=stream, width=0.125, size=size, frames=16)
        clips = ClipSettings(short_side=size + 8).to_json()
        checkpoint.save(folder / stream, model, Metadata(classes=tuple("abcdef"), clips=clips))
        flags += [f"--{stream}", str(folder / stream)]
    return flags
