"""How good the model of a training is on the validation split, a part of the videos on each worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

import models
from pipelines.clips.loader import stream_batches
from pipelines.clips.numbered import ValidationClips
from pipelines.datasets.video_index import VideoIndex
from pipelines.training.config import SCORE, Metrics, Run
from pipelines.training.state import TrainingState
from pipelines.training.step import autocast
from pipelines.training.sums import Sums, count_hits
from pipelines.training.worker import Worker


@torch.no_grad()
def validate(run: Run, videos: VideoIndex, worker: Worker, state: TrainingState) -> Metrics:
    """Loss and accuracy over all videos; one that cannot be decoded counts as wrong. All workers must ask.

    Raises RuntimeError where not one could be decoded: that would be no score of the model's. Storage that is away is
    an error of the stream.
    """
    clips = ValidationClips(
        videos=videos, input_spec=state.model.input_spec, settings=run.clips, protocol=run.reporting.validation
    )
    # One video a step. The last step is filled up with empty clips of weight 0, so that no worker waits for another.
    part = worker.part(start=0, batch=1, steps=math.ceil(len(videos) / worker.num_workers))
    sums = Sums(worker.device)
    errors: list[str] = []
    state.model.eval()
    for batch in stream_batches(clips, part, num_cpus=worker.data_cpus):
        inputs = batch.inputs(worker.device, run.clips.bound)
        labels, weights = batch.labels.to(worker.device), batch.weights.to(worker.device)
        with autocast(worker.device, run.optimisation.precision):
            scores = models.video_scores(state.model, {stream: views[0] for stream, views in inputs.items()})
        logits = scores[None]
        losses = models.cross_entropies(logits, labels) * weights
        # Not 1 - weight: what fills up the last step has no weight and has not failed.
        sums.add(loss=losses.sum(), clips=weights.sum(), failed=float(len(batch.errors)))
        sums.add(**count_hits(logits, labels, weights))
        errors += batch.errors
    return describe_validation(sums.reduce(), len(videos), worker.gather(errors))


def describe_validation(sums: Mapping[str, float], num_videos: int, errors: Sequence[str]) -> Metrics:
    """The metrics of a validation: the loss over decoded videos, the accuracies over all, some `errors` if any."""
    if not sums["clips"]:
        # Zero right ones would be a score, by which a search stops a trial for good.
        raise RuntimeError(f"none of the {num_videos} validation videos could be decoded: {errors[0]}")
    metrics = {
        "val_loss": sums["loss"] / sums["clips"],
        SCORE: sums["top1"] / num_videos,
        "val_top5": sums["top5"] / num_videos,
        "val_failed": int(sums["failed"]),
        "val_videos": num_videos,
    }
    return metrics | ({"errors": list(errors)} if errors else {})
