"""What a network's output means: the scores of a clip, of a video, and their loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.video_model import VideoModel


def clip_scores(logits: Tensor) -> Tensor:
    """A model's output as one row of logits for each clip, (B, num_classes): of (B, T, num_classes) the last step."""
    return logits if logits.ndim == 2 else logits[:, -1]


@torch.no_grad()
def video_scores(model: VideoModel, clips: Mapping[str, Tensor], *, batch_size: int = 16) -> Tensor:
    """Logits (num_classes,) float32 of a video from its clips (N, C, T, H, W) by stream: the mean over the N."""
    count = len(next(iter(clips.values())))
    # Averaged in float32, whatever the network computes in.
    scores = [
        clip_scores(model({stream: views[first : first + batch_size] for stream, views in clips.items()})).float()
        for first in range(0, count, batch_size)
    ]
    return torch.cat(scores).mean(dim=0)


def cross_entropies(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Each clip's cross-entropy (B,) with int64 labels (B,), the mean over its time steps where it has several."""
    steps = logits.shape[1] if logits.ndim == 3 else 1
    rows, targets = logits.flatten(0, -2).float(), labels.repeat_interleave(steps)
    # Not averaged over the clips: one that could not be decoded has weight 0, which only the caller knows.
    losses = nn.functional.cross_entropy(rows, targets, label_smoothing=label_smoothing, reduction="none")
    return losses.view(len(labels), steps).mean(dim=1)
