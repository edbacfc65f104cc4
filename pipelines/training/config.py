"""What a training is: model, clips, optimizer, schedule, videos and workers, as values; no Ray.

A run's settings decide about its weights; its scale (workers, failures) only about how they come about.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import models
from models import checkpoint
from models.input_spec import ModelConfig
from pipelines.clips.augmentation import Augmentation
from pipelines.clips.sampling import ClipSettings, Protocol
from pipelines.datasets.video_index import DataError, VideoIndex
from pipelines.training.schedule import Schedule

Precision = Literal["fp32", "bf16", "fp16"]
Metrics = dict[str, Any]

INITIAL = "initial"  # folder of a run with the weights it begins with
RESULT = "result.json"  # of a run or a sweep; written last
SCORE = "val_top1"  # what the best checkpoint is best by


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How weights are changed: SGD with momentum on `batch` clips of each worker, `accumulate` times a step."""

    schedule: Schedule
    batch: int = 6
    accumulate: int = 1
    momentum: float = 0.9
    weight_decay: float = 1e-7
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    precision: Precision = "fp32"
    sync_bn: bool = False
    train_only_head: bool = False

    def __post_init__(self) -> None:
        if min(self.batch, self.accumulate) < 1:
            raise ValueError(f"--batch is {self.batch}, --accumulate {self.accumulate}: give at least 1 each")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"--clip-norm is {self.clip_norm}: give a positive norm, or leave it out for none")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing is {self.label_smoothing}: give a share, 0 up to but not 1")

    def global_batch(self, num_workers: int) -> int:
        """Clips of one step."""
        return self.batch * self.accumulate * num_workers


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """When a run says and saves something, in steps."""

    log_every: int = 20
    checkpoint_every: int = 1000
    validation: Protocol = field(default_factory=lambda: Protocol(num_clips=1))

    def __post_init__(self) -> None:
        if min(self.log_every, self.checkpoint_every) < 1:
            raise ValueError(
                f"--log-every is {self.log_every}, --checkpoint-every {self.checkpoint_every}: give at least 1 step"
            )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The workers of a run and what each reserves. `min_workers`: go on with fewer where the cluster has no more."""

    num_workers: int
    min_workers: int | None = None
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    data_cpus: float | None = None
    max_failures: int = 3


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides about a run's weights, and its videos."""

    model: ModelConfig
    clips: ClipSettings
    augmentation: Augmentation
    optimisation: Optimisation
    reporting: Reporting
    seed: int
    initial: str  # what the weights begin with, in words
    train: VideoIndex
    validation: VideoIndex | None

    def describe(self) -> Metrics:
        """Settings as plain values, for run.json and checkpoints."""
        settings = ("model", "clips", "augmentation", "optimisation", "reporting")
        told = {name: asdict(getattr(self, name)) for name in settings}
        told["model"]["name"] = models.name_of(self.model)
        return {
            **json.loads(json.dumps(told)),
            "seed": self.seed,
            "initial": self.initial,
            "data": self.train.data,
            "classes": list(self.train.classes),
            "train_videos": len(self.train),
            "validation_videos": len(self.validation) if self.validation else 0,
        }

    def metadata(self, **extra: object) -> checkpoint.Metadata:
        """What the run's checkpoints say."""
        flow = "flow" in models.input_spec_of(self.model).train.streams
        return checkpoint.Metadata(
            classes=self.train.classes,
            flow_convention=self.train.convention["flow"] if flow else None,
            clips=self.clips.to_json(),
            extra={"run": self.describe(), **extra},
        )


def check_videos(run: Run) -> None:
    """DataError where the videos cannot train this model: none is left, or the classes do not fit."""
    for videos, what in ((run.train, "training"), (run.validation, "validation")):
        if videos is not None and not len(videos):
            raise DataError(f"{videos.data} has no labelled video in its shards for {what}")
    if run.model.num_classes != len(run.train.classes):
        raise DataError(f"the model has {run.model.num_classes} classes, {run.train.data} {len(run.train.classes)}")
