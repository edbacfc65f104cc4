"""What a training has come to: the model, the optimizer, the loss scale and the clips seen. This is what a checkpoint
saves, and all that a run needs to go on as if it had never been stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import checkpoint, cuda
from models.video_model import VideoModel
from pipelines.training.config import Run

Saved = Mapping[str, Any]  # optimizer, scaler, clips_seen: training.pt of a checkpoint


@dataclass(kw_only=True)
class TrainingState:
    """The state of a run on one worker: always whole, built at the beginning of a run or loaded from a checkpoint."""

    model: VideoModel
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    clips_seen: int = 0

    @classmethod
    def build(cls, model: VideoModel, run: Run, device: torch.device) -> TrainingState:
        """The state before the first step, with the model on its device."""
        model = place(model, run, device)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        # The learning rate is set before each step, from the clips seen.
        optimizer = torch.optim.SGD(
            trained, lr=0.0, momentum=run.optimisation.momentum, weight_decay=run.optimisation.weight_decay
        )
        # Only fp16 has so small a range that gradients vanish without a scale.
        scaler = torch.amp.GradScaler(device.type, enabled=run.optimisation.precision == "fp16")
        return cls(model=model, optimizer=optimizer, scaler=scaler)

    @classmethod
    def load(cls, folder: str, saved: Saved | None, run: Run, device: torch.device) -> TrainingState:
        """The state that a checkpoint holds, `saved` being what `read_saved` found there; without, a beginning."""
        model, _ = checkpoint.load(folder)
        state = cls.build(model, run, device)
        if saved:
            state.optimizer.load_state_dict(saved["optimizer"])
            state.scaler.load_state_dict(saved["scaler"])
        state.clips_seen = count_clips_seen(saved)
        return state

    def save(self, folder: str, metadata: checkpoint.Metadata) -> None:
        """Write a checkpoint; the workers' statistics of batch norm must have been averaged."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "clips_seen": self.clips_seen,
        }
        checkpoint.save(folder, self.model, metadata, training_state=state)

    def is_finite(self) -> bool:
        """Whether all weights and statistics are numbers; once one is not, no step makes it one again."""
        # Weights rather than the loss: where fp16 overflows, its scaler skips the step and the weights stay sound.
        tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def average_statistics(self, num_workers: int) -> None:
        """The running statistics of batch norm become their mean over the workers, which must all ask.

        Each worker's batch norm has seen its own clips only; whatever is validated or saved should know of all.
        """
        if num_workers > 1:
            for norm in batch_norms(self.model):
                for statistic in (norm.running_mean, norm.running_var):
                    assert statistic is not None
                    torch.distributed.all_reduce(statistic)
                    statistic /= num_workers


def read_saved(folder: str) -> Saved | None:
    """What a checkpoint says of its training besides the model; None of a run's initial weights."""
    return checkpoint.load_training_state(folder)


def count_clips_seen(saved: Saved | None) -> int:
    """The clips seen before a checkpoint, known before its model is built."""
    return int(saved["clips_seen"]) if saved else 0


def place(model: VideoModel, run: Run, device: torch.device) -> VideoModel:
    """The model as it is trained: frozen but for its classifier where asked for, on the device."""
    if run.train_only_head:
        for name, weight in model.named_parameters():
            weight.requires_grad = "logits" in name.split(".")
    if run.optimisation.sync_bn:
        model = cuda.synchronise_batch_norm(model)
    return cuda.place(model, device)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """All batch norm layers of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
