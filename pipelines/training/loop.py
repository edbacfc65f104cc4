"""What each worker of a training does: the same steps on its own clips, gradients averaged by DDP.

A step is known by the clips seen before it, and everything random in it follows from the seed and that number: a run
that goes on from a checkpoint takes the steps that it would have taken.

    state.py        model, optimizer, clips seen: what is saved, and what a run goes on from
    step.py         one step of the optimizer
    validation.py   accuracy on the validation split
    report.py       metrics of the steps, validations, checkpoints
    worker.py       which worker this is, and what all of them do together
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray.train

import models
from models import cuda
from pipelines import storage
from pipelines.clips.loader import Batch, begin, stream_batches
from pipelines.clips.numbered import TrainingClips
from pipelines.lock import Claim
from pipelines.training.config import INITIAL, Run, Scale
from pipelines.training.log import TrainingLog
from pipelines.training.report import describe_divergence, report_checkpoint, report_steps
from pipelines.training.state import TrainingState, count_clips_seen, read_saved
from pipelines.training.step import TrainingStep
from pipelines.training.weights_files import local_checkpoint
from pipelines.training.worker import Worker


def train_worker(
    run: Run, output: str, scale: Scale, mailbox: Any, tensorboard: bool = True, claim: Claim | None = None
) -> str | None:
    """Train from the initial weights, or from the last checkpoint, to the schedule's end.

    Returns why it ended before, where the run has diverged. That is no exception: Ray Train would start the workers
    again, and they would come to the same. Nor is it one that the output is another run's by now (`claim`).
    """
    worker = Worker.here(scale)
    optimisation, total = run.optimisation, run.schedule.clips
    cuda.set_up(worker.device, optimisation.precision, training=True)

    with _find_checkpoint(output) as folder:
        # Data: from the clip that comes next on. It begins first: what decodes starts while the model is built.
        saved = read_saved(folder)
        batches = _begin_batches(run, worker, clips_seen=count_clips_seen(saved))

        # Model and optimizer: as the last checkpoint left them, or as the run begins.
        state = TrainingState.load(folder, saved, run, worker.device)

    # Step: forward, backward, update.
    step = TrainingStep(run, worker, state, compiled=scale.compile, records=scale.cuda_graphs)

    # Report: intervals are in clips, of as many workers as were asked for. An elastic run that goes on with fewer takes
    # more and smaller steps, and reports at the same places.
    clips_of_step = optimisation.global_batch(scale.num_workers)
    log_every = run.reporting.log_every * clips_of_step
    checkpoint_every = run.reporting.checkpoint_clips(run.schedule, clips_of_step)
    with (
        TrainingLog(output, mailbox, clips_seen=state.clips_seen, tensorboard=tensorboard)
        if worker.rank == 0
        else nullcontext()
    ) as log:
        while state.clips_seen < total:
            step.take(batches)
            last, step_number = state.clips_seen >= total, state.clips_seen // clips_of_step
            logging_due = last or _has_passed(log_every, state.clips_seen, step.clips)
            checkpoint_due = last or _has_passed(checkpoint_every, state.clips_seen, step.clips)
            # Not after each step: a GPU would have to wait for the answer.
            due = logging_due or checkpoint_due
            if due and worker.any(worker.rank == 0 and claim is not None and claim.is_lost()):
                if log:
                    log.leave()  # its lines would replace those of the other run
                break
            diverged = due and worker.any(not state.is_finite())
            if logging_due or diverged:
                report_steps(run, worker, step, log, step_number=step_number)
            if diverged:
                return describe_divergence(state.clips_seen, step_number)
            if checkpoint_due:
                report_checkpoint(run, worker, state, log, step_number=step_number)
    return None


def _find_checkpoint(output: str) -> AbstractContextManager[str]:
    """A local folder of the last checkpoint that Ray Train knows, else of the weights that the run begins with."""
    saved = ray.train.get_checkpoint()
    return saved.as_directory() if saved else local_checkpoint(storage.join(output, INITIAL))


def _begin_batches(run: Run, worker: Worker, *, clips_seen: int) -> Iterator[Batch]:
    """This worker's batches to the schedule's end; the first ones are decoded from now on.

    Every clip of the run has a number, from which and the seed it follows what it shows.
    """
    clips = TrainingClips(
        videos=run.train,
        input_spec=models.input_spec_of(run.model),
        settings=run.clips,
        augmentation=run.augmentation,
        seed=run.seed,
    )
    optimisation = run.optimisation
    steps_left = math.ceil((run.schedule.clips - clips_seen) / optimisation.global_batch(worker.num_workers))
    # Each batch of an accumulated step is a step to the stream.
    part = worker.part(start=clips_seen, batch=optimisation.batch, steps=steps_left * optimisation.accumulate)
    return begin(stream_batches(clips, part, num_cpus=worker.data_cpus))


def _has_passed(every: int, clips_seen: int, batch: int) -> bool:
    """Whether the last `batch` of the clips seen led over a multiple of `every`."""
    return clips_seen // every > (clips_seen - batch) // every
