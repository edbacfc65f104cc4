"""One step of the optimizer: `accumulate` batches on each worker, gradients averaged over all clips of all workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import models
from models import cuda
from pipelines.clips.loader import Batch
from pipelines.training.config import Precision, Run
from pipelines.training.state import TrainingState, batch_norms
from pipelines.training.sums import Sums, count_hits
from pipelines.training.worker import Worker

logger = logging.getLogger(__name__)


class TrainingStep:
    """Takes steps, which change `state`; what they came to is in `sums` and `errors` until someone reads these."""

    def __init__(
        self, run: Run, worker: Worker, state: TrainingState, *, compiled: bool = False, records: bool = True
    ) -> None:
        self.run, self.worker, self.state = run, worker, state
        self.optimisation = run.optimisation
        self.clips = run.optimisation.global_batch(worker.num_workers)  # of one step, over all workers
        # Validation and checkpoints keep to `state.model`, whose names stay and which needs no compiling for its clips.
        network = cast(nn.Module, torch.compile(state.model)) if compiled else state.model
        self.network: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] = _parallelise(network, worker)
        # Accumulated gradients must outlive a step's next batch, which those of a recorded step do not.
        alone = worker.num_workers == run.optimisation.accumulate == 1
        self.records = records and not compiled and alone and cuda.can_record(worker.device)
        self.sums, self.waits = Sums(worker.device), Waits(worker.device)
        self.errors: list[str] = []  # why clips could not be decoded

    def take(self, batches: Iterator[Batch]) -> None:
        """One step on the next `accumulate` batches."""
        started = time.monotonic()
        self._begin()
        for left in reversed(range(self.optimisation.accumulate)):
            batch = self.waits.fetch(batches)
            # DDP averages gradients in the last backward pass only; before, they add up on each worker alone.
            with self._without_sync(left > 0):
                self._add_gradient(batch)
        self._clip_gradient()
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()
        self.state.clips_seen += self.clips
        waited = self.waits.take()
        self.sums.add(waited=waited, seconds=time.monotonic() - started)

    def _begin(self) -> None:
        rate = self.run.schedule.learning_rate(self.state.clips_seen, self.clips)
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        # Dropout draws anew from the clips seen: a run that goes on drops what it would have dropped.
        torch.manual_seed(_seed_of(self.run.seed, self.state.clips_seen, self.worker.rank))
        self.state.model.train()
        if self.run.train_only_head:  # fixed features: their batch norm keeps the statistics it came with
            for norm in batch_norms(self.state.model):
                norm.eval()
        self.state.optimizer.zero_grad(set_to_none=True)

    def _without_sync(self, skip: bool) -> AbstractContextManager[Any]:
        if skip and isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    def _add_gradient(self, batch: Batch) -> None:
        inputs = batch.inputs(self.worker.device, self.run.clips.bound)
        labels, weights = (cuda.upload(values, self.worker.device) for values in (batch.labels, batch.weights))
        self.waits.begin_batch()
        if self.records:
            self.records = False
            self._record(inputs)
        with autocast(self.worker.device, self.optimisation.precision):
            logits = self.network(inputs)
        # Outside of autocast: the loss and its sums stay fp32.
        smoothing = self.optimisation.label_smoothing
        losses = models.cross_entropies(logits, labels, label_smoothing=smoothing) * weights
        # A clip that could not be decoded counts as one without loss: the others keep their weight.
        self.state.scaler.scale(losses.sum() / (len(labels) * self.optimisation.accumulate)).backward()
        self.sums.add(loss=losses.detach().sum(), clips=weights.sum(), failed=(1 - weights).sum())
        self.sums.add(**count_hits(models.clip_scores(logits.detach()), labels, weights))
        self.errors += batch.errors

    def _record(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """From here on the network's launches are replayed, where they can be recorded: the steps are the same."""
        try:
            self.network = cuda.record(self.state.model, inputs, self.optimisation.precision)
        except RuntimeError as error:
            logger.warning("the launches of a step could not be recorded as CUDA graphs, steps take longer: %s", error)

    def _clip_gradient(self) -> None:
        if self.optimisation.clip_norm is not None:
            # The norm is that of the gradient itself, not of the one that fp16 has scaled.
            self.state.scaler.unscale_(self.state.optimizer)
            nn.utils.clip_grad_norm_(self.state.model.parameters(), self.optimisation.clip_norm)


class Waits:
    """Seconds without clips: on a CPU until the next batch is there, on a GPU while that had no work meanwhile.

    A CPU has launched a step long before its GPU has computed it, and fetches the next batch meanwhile. It is kept from
    being further ahead than that, for each batch takes memory on the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0
        # On a GPU: all that was launched before a batch was asked for is done, and the batch is there.
        self.idle: torch.cuda.Event | None = None
        self.begun: torch.cuda.Event | None = None

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch."""
        if self.on_gpu:
            self._count()
            self.idle = _mark()
            return next(batches)
        started = time.monotonic()
        batch = next(batches)
        self.seconds += time.monotonic() - started
        return batch

    def begin_batch(self) -> None:
        """The batch is on its way to the device, and what is launched from here on computes with it."""
        if self.on_gpu:
            self.begun = _mark()

    def take(self) -> float:
        """The seconds since it was asked; on a GPU it waits until the last batch's computing has begun."""
        self._count()
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _count(self) -> None:
        if self.idle and self.begun:
            self.begun.synchronize()
            self.seconds += self.idle.elapsed_time(self.begun) / 1000
            self.begun = None


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _parallelise(model: nn.Module, worker: Worker) -> nn.Module:
    if worker.num_workers == 1:
        return model
    devices = [worker.device] if worker.device.type == "cuda" else None
    # Running statistics are averaged when they are used, not overwritten by the first worker's before each step.
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The precision of a forward pass."""
    return torch.autocast(device.type, cuda.DTYPES[precision], enabled=precision != "fp32")


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
