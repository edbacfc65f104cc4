"""What a training is: model, clips, optimizer, schedule, videos and workers, as values; no Ray.

A run's settings decide about its weights; its scale (workers, failures) only about how they come about.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

import models
from models import checkpoint
from models.cost import blank_clips
from models.input_spec import ModelConfig
from pipelines.clips.augmentation import Augmentation
from pipelines.clips.sampling import ClipSettings, EvaluationProtocol
from pipelines.datasets.video_index import VideoIndex
from pipelines.errors import DataError, RunError, SettingsError
from pipelines.formatting import format_count
from pipelines.training.schedule import Schedule

Precision = Literal["fp32", "bf16", "fp16"]
Metrics = dict[str, Any]

INITIAL = "initial"  # folder of a run with the weights it begins with
SCORE = "val_top1"  # what the best checkpoint is best by


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How weights are changed: SGD with momentum on `batch` clips of each worker, `accumulate` times a step."""

    batch: int = 6
    """Clips per worker and forward pass."""
    accumulate: int = 1
    """Batches whose gradients are accumulated for one step."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-7
    """L2 penalty on the weights."""
    label_smoothing: float = 0.0
    """Fraction of the target that is spread over all classes."""
    clip_norm: float | None = None
    """Clip the gradient to this norm. None: no clipping."""
    precision: Precision = "fp32"
    """Precision of the convolutions; weights and sums stay fp32. fp16 is for GPUs, where fp32 multiplies in TF32."""
    sync_bn: bool = False
    """Synchronise batch norm over all workers (GPUs only)."""

    def __post_init__(self) -> None:
        if min(self.batch, self.accumulate) < 1:
            raise SettingsError(f"--batch is {self.batch}, --accumulate {self.accumulate}: give at least 1 each")
        if not 0 <= self.momentum < 1:
            raise SettingsError(f"--momentum is {self.momentum}: give a share, 0 up to but not 1")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingsError(f"--weight-decay is {self.weight_decay}: give a penalty, 0 for none")
        # Not `<=`: what is no number compares with nothing.
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise SettingsError(f"--clip-norm is {self.clip_norm}: give a positive norm, or leave it out for none")
        if not 0 <= self.label_smoothing < 1:
            raise SettingsError(f"--label-smoothing is {self.label_smoothing}: give a share, 0 up to but not 1")

    def global_batch(self, num_workers: int) -> int:
        """Clips of one step."""
        return self.batch * self.accumulate * num_workers


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """When a run says and saves something, in steps; `checkpoint_every` None: a tenth of the run, at least 100."""

    log_every: int = 20
    """Steps between lines of metrics."""
    checkpoint_every: int | None = None
    """Steps between validations with a checkpoint. None: a tenth of the run, at least 100."""
    validation_clips: int = 1
    """Clips per video that a validation scores, spread over the video."""

    def __post_init__(self) -> None:
        if self.validation_clips < 1:
            raise SettingsError(f"--validation-clips is {self.validation_clips}: give at least 1 clip of each video")
        if self.log_every < 1 or (self.checkpoint_every is not None and self.checkpoint_every < 1):
            raise SettingsError(
                f"--log-every is {self.log_every}, --checkpoint-every {self.checkpoint_every}: give at least 1 step"
            )

    @property
    def validation(self) -> EvaluationProtocol:
        """What of a video a validation scores."""
        return EvaluationProtocol(num_clips=self.validation_clips)

    def to_json(self) -> dict[str, object]:
        """As run.json has them."""
        intervals = {"log_every": self.log_every, "checkpoint_every": self.checkpoint_every}
        return {**intervals, "validation": asdict(self.validation)}

    def checkpoint_clips(self, schedule: Schedule, clips_of_step: int) -> int:
        """Clips between two checkpoints, at steps of `clips_of_step` clips where the interval is given in steps."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every * clips_of_step
        # In steps of the schedule, not of the workers at hand: the same run on more workers saves at the same clips.
        return max(100, schedule.reference_steps // 10) * schedule.reference_batch


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The workers of a run and what each reserves. `min_workers`: go on with fewer where the cluster has no more.

    `compile`: by torch.compile, which takes over a minute before the first step. `cuda_graphs`: a single GPU's worker
    records the launches of a step and replays them. `cleaner`: an actor frees what the workers reserved if Ray Train's
    controller dies; a Ray that ends with the run needs none.
    """

    num_workers: int
    min_workers: int | None = None
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    data_cpus: float | None = None
    max_failures: int = 3
    compile: bool = False
    cuda_graphs: bool = True
    cleaner: bool = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides about a run's weights, and its videos."""

    model: ModelConfig
    clips: ClipSettings
    augmentation: Augmentation
    optimisation: Optimisation
    schedule: Schedule
    train_only_head: bool = False
    reporting: Reporting
    seed: int
    initial: str  # what the weights begin with, in words
    train: VideoIndex
    validation: VideoIndex | None

    def describe(self) -> Metrics:
        """Settings as plain values, for run.json and checkpoints."""
        settings = {
            "model": {**asdict(self.model), "name": models.name_of(self.model)},
            "clips": self.clips.to_json(),
            "augmentation": asdict(self.augmentation),
            "optimisation": {
                **asdict(self.optimisation),
                "schedule": asdict(self.schedule),
                "train_only_head": self.train_only_head,
            },
            "reporting": self.reporting.to_json(),
        }
        return {
            **json.loads(json.dumps(settings)),  # tuples become the lists that run.json will be read back as
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
            flow_convention=self.train.convention.flow if flow else None,
            clips=self.clips.to_json(),
            extra={"run": self.describe(), **extra},
        )


def check_run(run: Run, num_workers: int) -> None:
    """What would otherwise end each worker. Raises DataError and RunError."""
    check_videos(run)
    check_batch(run, num_workers)


def check_videos(run: Run) -> None:
    """DataError where the videos cannot train this model: none is left, or the classes do not fit."""
    remedies = {"training": "give another --train-split", "validation": "give another --validation-split, or none"}
    for videos, what in ((run.train, "training"), (run.validation, "validation")):
        if videos is not None and not len(videos):
            raise DataError(f"{videos.data} has no labelled video in its shards for {what}: {remedies[what]}")
    if run.model.num_classes != len(run.train.classes):
        raise DataError(
            f"the model has {format_count(run.model.num_classes, 'class')}, {run.train.data} {len(run.train.classes)}"
        )


def check_batch(run: Run, num_workers: int) -> None:
    """RunError where the network cannot train on so few clips at a time.

    Batch norm needs more than one value of each channel. How many there are depends on the layers' strides, so one
    forward pass is taken on the meta device, where nothing is computed.
    """
    if run.train_only_head:  # its batch norm is in evaluation mode
        return
    # Synchronised, batch norm sees the clips of all workers.
    clips = run.optimisation.batch * (num_workers if run.optimisation.sync_bn else 1)
    if clips > 1:  # as many values of each channel at least
        return
    with torch.device("meta"), torch.no_grad():
        model = models.build_from(run.model).train()
        inputs = blank_clips(model.input_spec.train, model.input_spec.size, batch=clips)
        try:
            models.cross_entropies(model(inputs), torch.zeros(clips, dtype=torch.int64))
        except ValueError as error:
            raise RunError(
                f"{models.name_of(run.model)} cannot train on {format_count(clips, 'clip')} at a time: {error}. "
                f"--batch is {run.optimisation.batch}: give more"
            ) from error
