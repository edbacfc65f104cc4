"""What each worker of a training does: the same steps on its own clips, gradients averaged by DDP.

A step is known by the clips seen before it, and everything random in it follows from the seed and that number: a run
that goes on from a checkpoint takes the steps that it would have taken. Metrics are sums over clips and workers,
divided once. Batch norm's running statistics are averaged over the workers whenever they are used or saved.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
from models import checkpoint
from models.input_spec import VideoModel
from pipelines import storage
from pipelines.clips.loader import Batch, TrainingClips, ValidationClips, WorkerPart, stream_batches
from pipelines.datasets.video_index import VideoIndex
from pipelines.training.config import INITIAL, SCORE, Metrics, Run, Scale
from pipelines.training.log import TrainingLog
from pipelines.training.weights_files import local_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_ERRORS = 20  # told of one log interval
COUNTED = ("loss", "top1", "top5", "clips", "failed", "seconds", "waited")


def train_worker(run: Run, output: str, scale: Scale, mailbox: Any) -> None:
    """Train from the initial weights, or from the last checkpoint, to the schedule's end."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    worker = Worker(run, scale, device, rank=context.get_world_rank(), num_workers=context.get_world_size())
    worker.restore(output)
    with TrainingLog(output, mailbox, clips_seen=worker.clips_seen) if worker.rank == 0 else nullcontext() as log:
        worker.run_to_end(log)


class Sums:
    """Sums over the clips of this worker since the last reduction."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(COUNTED), dtype=torch.float64, device=device)

    def add(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.values[COUNTED.index(name)] += value

    def reduce(self) -> dict[str, float]:
        """The sums over all workers; begins anew."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.values)
        found = dict(zip(COUNTED, self.values.tolist(), strict=True))
        self.values.zero_()
        return found


class Worker:
    """One worker: its model, its place in the run, and the steps."""

    def __init__(self, run: Run, scale: Scale, device: torch.device, *, rank: int, num_workers: int) -> None:
        self.run, self.scale, self.device, self.rank, self.num_workers = run, scale, device, rank, num_workers
        self.optimisation = run.optimisation
        self.batch = run.optimisation.global_batch(num_workers)
        self.asked_batch = run.optimisation.global_batch(scale.num_workers)
        self.clips_seen = 0
        self.sums = Sums(device)
        self.errors: list[str] = []

    @property
    def step(self) -> int:
        """Steps that the clips seen amount to, counted as of all workers asked for: with fewer, one takes several."""
        return self.clips_seen // self.asked_batch

    def _is_due(self, every: int) -> bool:
        """Whether what is done every so many steps is done after the step that was just taken."""
        clips = every * self.asked_batch
        return self.clips_seen // clips > (self.clips_seen - self.batch) // clips

    def restore(self, output: str) -> None:
        """The model and the optimizer, from the last checkpoint of the run or from its initial weights."""
        saved = ray.train.get_checkpoint()
        source = saved.as_directory() if saved else local_checkpoint(storage.join(output, INITIAL))
        with source as folder:
            model, _ = checkpoint.load(folder)
            state: Mapping[str, Any] = checkpoint.load_training_state(folder) or {}
        self.model = self._place(model)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, lr=0.0, momentum=self.optimisation.momentum, weight_decay=self.optimisation.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.optimisation.precision == "fp16")
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.clips_seen = int(state["clips_seen"])
        self.input_spec = self.model.input_spec
        self.parallel = self._parallelise()

    def _place(self, model: VideoModel) -> VideoModel:
        if self.optimisation.train_only_head:
            for name, weight in model.named_parameters():
                weight.requires_grad = "logits" in name.split(".")
        if self.optimisation.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.device.type == "cuda":  # not measured
            model = model.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return model

    def _parallelise(self) -> nn.Module:
        if self.num_workers == 1:
            return self.model
        devices = [self.device] if self.device.type == "cuda" else None
        # Running statistics are averaged by `_share_statistics`, not overwritten by the first worker's.
        return nn.parallel.DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)

    def run_to_end(self, log: TrainingLog | None) -> None:
        """All steps that are left, with what is logged, validated and saved in between."""
        reporting, total = self.run.reporting, self.run.optimisation.schedule.clips
        batches = self._stream(math.ceil((total - self.clips_seen) / self.batch))
        while self.clips_seen < total:
            started = time.monotonic()
            self._take_step(batches)
            self.sums.add(seconds=time.monotonic() - started)
            last = self.clips_seen >= total
            if last or self._is_due(reporting.log_every):
                metrics = self._describe_steps()
                if log:
                    log.add("train", metrics)
            if last or self._is_due(reporting.checkpoint_every):
                self._report(log)

    def _stream(self, steps: int) -> Iterator[Batch]:
        clips = TrainingClips(
            videos=self.run.train,
            input_spec=self.input_spec,
            settings=self.run.clips,
            augmentation=self.run.augmentation,
            seed=self.run.seed,
        )
        # Each batch of an accumulated step is a step to the stream.
        steps *= self.optimisation.accumulate
        part = self._share(start=self.clips_seen, batch=self.optimisation.batch, steps=steps)
        return stream_batches(clips, part, num_cpus=self._data_cpus())

    def _share(self, *, start: int, batch: int, steps: int) -> WorkerPart:
        return WorkerPart(start=start, rank=self.rank, num_workers=self.num_workers, batch=batch, steps=steps)

    def _data_cpus(self) -> float:
        """This worker's part of the CPUs that no worker has reserved."""
        if self.scale.data_cpus is not None:
            return self.scale.data_cpus / self.num_workers
        cpus = ray.cluster_resources().get("CPU", 1.0)
        return max(cpus - self.num_workers * self.scale.cpus_per_worker, 0.0) / self.num_workers

    def _take_step(self, batches: Iterator[Batch]) -> None:
        """One step of the optimizer, on `accumulate` batches."""
        rate = self.optimisation.schedule.learning_rate(self.clips_seen, self.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(_seed_of(self.run.seed, self.clips_seen, self.rank))  # of dropout
        self._set_training_mode()
        self.optimizer.zero_grad(set_to_none=True)
        for left in reversed(range(self.optimisation.accumulate)):
            asked = time.monotonic()
            batch = next(batches)
            self.sums.add(waited=time.monotonic() - asked)
            with self._without_sync(left > 0):
                self._add_gradient(batch)
        if self.optimisation.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optimisation.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.clips_seen += self.batch

    def _set_training_mode(self) -> None:
        self.model.train()
        if self.optimisation.train_only_head:  # fixed features: their batch norm keeps the statistics it came with
            for norm in self._norms():
                norm.eval()

    def _norms(self) -> list[_BatchNorm]:
        return [module for module in self.model.modules() if isinstance(module, _BatchNorm)]

    def _without_sync(self, skip: bool) -> AbstractContextManager[Any]:
        if skip and isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.optimisation.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")

    def _add_gradient(self, batch: Batch) -> None:
        inputs = batch.inputs(self.device, self.run.clips.flow_bound)
        labels, weights = batch.labels.to(self.device), batch.weights.to(self.device)
        with self._autocast():
            logits = self.parallel(inputs)
        smoothing = self.optimisation.label_smoothing
        losses = models.cross_entropies(logits, labels, label_smoothing=smoothing) * weights
        # A clip that could not be decoded counts as one without loss: the others keep their weight.
        self.scaler.scale(losses.sum() / (len(labels) * self.optimisation.accumulate)).backward()
        self.sums.add(loss=losses.detach().sum(), clips=weights.sum(), failed=(1 - weights).sum())
        self.sums.add(**_count_hits(models.clip_scores(logits.detach()), labels, weights))
        self.errors += batch.errors

    def _describe_steps(self) -> Metrics:
        """The metrics of the steps since the last time, over all workers."""
        sums = self.sums.reduce()
        counted = max(sums["clips"], 1.0)
        metrics = {
            "step": self.step,
            "clips": self.clips_seen,
            "epoch": round(self.clips_seen / len(self.run.train), 3),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": sums["loss"] / counted,
            "top1": sums["top1"] / counted,
            "failed": int(sums["failed"]),
            "clips_per_s": round((sums["clips"] + sums["failed"]) / (sums["seconds"] / self.num_workers), 2),
            "wait_share": round(sums["waited"] / sums["seconds"], 4),
        }
        if sums["failed"]:
            metrics["errors"] = self._gather_errors()
            if not sums["clips"]:  # storage is down, or the shards are gone: steps on nothing would spoil the weights
                raise RuntimeError(
                    f"none of the last {metrics['failed']} clips could be decoded: {metrics['errors'][0]}"
                )
        return metrics

    def _gather_errors(self) -> list[str]:
        """Reasons of clips that could not be decoded, of all workers; the first few."""
        gathered: list[list[str]] = [self.errors]
        if self.num_workers > 1:
            gathered = [[] for _ in range(self.num_workers)]
            torch.distributed.all_gather_object(gathered, self.errors)
        self.errors = []
        return [error for errors in gathered for error in errors][:MAX_ERRORS]

    def _report(self, log: TrainingLog | None) -> None:
        """Validate, and save a checkpoint through Ray Train; a barrier for all workers."""
        self._share_statistics()
        metrics: Metrics = {"step": self.step, "clips": self.clips_seen}
        if self.run.validation is not None:
            metrics |= self._validate(self.run.validation)
            if log:
                log.add("validation", metrics)
        if log is None:
            ray.train.report(metrics)
            return
        log.flush()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, self.model, self.run.metadata(**metrics), training_state=self._state())
            saved = Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=f"step-{self.step:07d}")

    def _state(self) -> dict[str, object]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "clips_seen": self.clips_seen,
        }

    def _share_statistics(self) -> None:
        """The running statistics of batch norm become their mean over the workers."""
        if self.num_workers > 1:
            for norm in self._norms():
                for statistic in (norm.running_mean, norm.running_var):
                    assert statistic is not None
                    torch.distributed.all_reduce(statistic)
                    statistic /= self.num_workers

    @torch.no_grad()
    def _validate(self, videos: VideoIndex) -> Metrics:
        """Loss and accuracy over all videos of the validation split; one that cannot be decoded counts as wrong."""
        clips = ValidationClips(
            videos=videos, input_spec=self.input_spec, settings=self.run.clips, protocol=self.run.reporting.validation
        )
        part = self._share(start=0, batch=1, steps=math.ceil(len(videos) / self.num_workers))
        sums = Sums(self.device)
        self.model.eval()
        for batch in stream_batches(clips, part, num_cpus=self._data_cpus()):
            inputs = batch.inputs(self.device, self.run.clips.flow_bound)
            labels, weights = batch.labels.to(self.device), batch.weights.to(self.device)
            with self._autocast():
                scores = models.video_scores(self.model, {stream: views[0] for stream, views in inputs.items()})
            logits = scores[None]
            losses = models.cross_entropies(logits, labels) * weights
            sums.add(loss=losses.sum(), clips=weights.sum(), failed=float(len(batch.errors)))
            sums.add(**_count_hits(logits, labels, weights))
        found = sums.reduce()
        return {
            "val_loss": found["loss"] / max(found["clips"], 1.0),
            SCORE: found["top1"] / len(videos),
            "val_top5": found["top5"] / len(videos),
            "val_failed": int(found["failed"]),
            "val_videos": len(videos),
        }


def _count_hits(scores: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Clips whose class is the first, or among the first five, of their scores (B, num_classes)."""
    first = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": (first[:, 0] * weights).sum(), "top5": (first.any(dim=1) * weights).sum()}


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
