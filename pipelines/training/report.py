"""What a training says of itself on the way: the metrics of its steps, validations, and checkpoints."""

from __future__ import annotations

import tempfile

import ray.train
from ray.train import Checkpoint

from pipelines.formatting import format_count
from pipelines.training.config import Metrics, Run
from pipelines.training.log import TrainingLog
from pipelines.training.state import TrainingState
from pipelines.training.step import TrainingStep
from pipelines.training.validation import validate
from pipelines.training.worker import Worker


def report_steps(run: Run, worker: Worker, step: TrainingStep, log: TrainingLog | None, *, step_number: int) -> None:
    """Log the metrics of the steps since the last time, over all workers; only the first worker has a log."""
    metrics = describe_steps(run, worker, step, step_number=step_number)
    if log:
        log.add("train", metrics)


def describe_steps(run: Run, worker: Worker, step: TrainingStep, *, step_number: int) -> Metrics:
    """The metrics of the steps since the last time. Raises RuntimeError where none of their clips could be decoded."""
    sums = step.sums.reduce()
    counted = max(sums["clips"], 1.0)
    metrics = {
        "step": step_number,
        "clips": step.state.clips_seen,
        "epoch": round(step.state.clips_seen / len(run.train), 3),
        "learning_rate": step.state.optimizer.param_groups[0]["lr"],
        "loss": sums["loss"] / counted,
        "top1": sums["top1"] / counted,
        "failed": int(sums["failed"]),
        # Seconds are summed over workers that work at the same time.
        "clips_per_s": round((sums["clips"] + sums["failed"]) / (sums["seconds"] / worker.num_workers), 2),
        "wait_share": round(sums["waited"] / sums["seconds"], 4),
    }
    if sums["failed"]:
        metrics["errors"] = worker.gather(step.errors)
        step.errors = []
        if not sums["clips"]:  # the shards are gone: steps on nothing would spoil the weights
            raise RuntimeError(
                f"none of the last {format_count(metrics['failed'], 'clip')} could be decoded: {metrics['errors'][0]}"
            )
    return metrics


def report_checkpoint(
    run: Run, worker: Worker, state: TrainingState, log: TrainingLog | None, *, step_number: int
) -> None:
    """Validate, and save a checkpoint through Ray Train; a barrier for all workers."""
    state.average_statistics(worker.num_workers)
    metrics: Metrics = {"step": step_number, "clips": state.clips_seen}
    if run.validation is not None:
        metrics |= validate(run, run.validation, worker, state)
        if log:
            log.add("validation", metrics)
        metrics.pop("errors", None)  # said once; checkpoints and searches take the figures
    if log is None:
        # Ray Train waits until every worker has reported; the checkpoint is the first one's.
        ray.train.report(metrics)
        return
    # Before the checkpoint: a run that goes on from it finds the lines up to it.
    log.flush()
    with tempfile.TemporaryDirectory() as folder:
        state.save(folder, run.metadata(**metrics))
        saved = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=checkpoint_name(state.clips_seen))


def describe_divergence(clips_seen: int, step_number: int) -> str:
    """What a run that has diverged says, and what helps."""
    return (
        f"by step {step_number:,} ({format_count(clips_seen, 'clip')}) some weights or statistics "
        f"are infinite or not a number. "
        "Start a new run with a smaller --learning-rate, with --warmup-steps or with --clip-norm"
    )


def checkpoint_name(clips_seen: int) -> str:
    """The folder of a checkpoint: `clips-000000960`.

    By clips, which only grow. Steps are of as many workers as were asked for: after a resume on more of them a number
    would come twice, and Ray Train, which deletes what it has replaced, would delete the newest checkpoint.
    """
    return f"clips-{clips_seen:09d}"
