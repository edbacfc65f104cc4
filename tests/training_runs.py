"""A small run whose clips are made by hand: a training without Ray and without shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch

import models
from models.video_model import VideoModel
from pipelines.clips.augmentation import Augmentation
from pipelines.clips.loader import Batch
from pipelines.clips.sampling import ClipSettings
from pipelines.datasets.records import FrameSampling
from pipelines.datasets.video_index import VideoIndex
from pipelines.training.config import Optimisation, Reporting, Run
from pipelines.training.schedule import Schedule
from pipelines.training.worker import Worker

CLASSES = ("left", "right")
SAMPLING = FrameSampling(fps=25.0, short_side=40)
CONFIG = models.configure("c3d", num_classes=2, stream="rgb", width=0.03125, size=32, dropout=0.5)
WORKER = Worker(rank=0, num_workers=1, device=torch.device("cpu"), data_cpus=1.0)


def make_index(num_videos: int = 4, *, label: int = 0) -> VideoIndex:
    """Videos of one label, which lie nowhere."""
    table = pa.table({"id": [f"v{number}" for number in range(num_videos)], "label": [label] * num_videos})
    return VideoIndex(data="nowhere", table=table, classes=CLASSES, convention={}, sampling=SAMPLING)


def make_run(
    *,
    videos: VideoIndex | None = None,
    reporting: Reporting | None = None,
    schedule: Schedule | None = None,
    train_only_head: bool = False,
    **optimisation: Any,
) -> Run:
    """20 steps of 4 clips."""
    return Run(
        model=CONFIG,
        clips=ClipSettings(),
        augmentation=Augmentation(),
        optimisation=Optimisation(**{"batch": 4, **optimisation}),
        schedule=schedule or Schedule(phases=((20, 0.1),), reference_batch=4),
        train_only_head=train_only_head,
        reporting=reporting or Reporting(),
        seed=0,
        initial="scratch",
        train=videos or make_index(),
        validation=None,
    )


def make_model(*, dropout: float = 0.5) -> VideoModel:
    """The same weights each time."""
    torch.manual_seed(0)
    return models.build_from(replace(CONFIG, dropout=dropout))


def make_batches(size: int = 4, *, first: int = 0, weight: float = 1.0) -> Iterator[Batch]:
    """Endless batches of noise; number n is the same clip each time."""
    while True:
        numbers = tuple(range(first, first + size))
        noise = [torch.randint(256, (16, 32, 32, 3), generator=torch.Generator().manual_seed(n)) for n in numbers]
        yield Batch(
            streams={"rgb": torch.stack(noise).to(torch.uint8)},
            labels=torch.tensor(numbers) % 2,
            weights=torch.full((size,), weight),
            errors=() if weight else ("v0: it is broken",) * size,
            numbers=numbers,
        )
        first += size
