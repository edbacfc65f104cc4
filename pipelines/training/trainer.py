"""A training on Ray Train: what a run is, its folder, and the trainer that starts, restarts and ends it.

    RUN/run.json              settings and data, written before any work; another run on this folder is refused
    RUN/initial/              the weights that training begins with, as a checkpoint
    RUN/checkpoints/clips-…/  the best and the last checkpoint, by the clips seen
    RUN/metrics.jsonl         one line per log interval and per validation
    RUN/tensorboard/          the same for TensorBoard
    RUN/result.json           what came out; written last

What each worker does is `pipelines.training.loop`. A run that was stopped, however, goes on from its last checkpoint
when it is started again.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from models import checkpoint
from models.video_model import VideoModel
from pipelines import records, storage
from pipelines.errors import DivergedError, RunError
from pipelines.lock import Claim
from pipelines.ray_data import polled_actor
from pipelines.resume import was_begun
from pipelines.training.config import INITIAL, SCORE, Metrics, Run, Scale, check_run
from pipelines.training.mailbox import Mailbox
from pipelines.training.ray_train import ProcessGroup, Trainer, run_worker
from pipelines.training.records import RESULT, RUN, RunResult
from pipelines.training.results import Result, keep_interval, read_result

CHECKPOINTS = "checkpoints"


def train(
    run: Run,
    model: VideoModel,
    output: str,
    scale: Scale,
    *,
    on_metrics: Callable[[Metrics], None] | None = None,
    tensorboard: bool = True,
    claim: Claim | None = None,
    callbacks: list[Any] | None = None,
) -> Result:
    """Train `model`, whose weights are the initial ones, and return the result; resumes what `output` holds.

    Ray must be running, and the caller hold the output's lock. `on_metrics` gets every line of metrics.jsonl.
    `tensorboard` writes its event files. By the lock's `claim` workers tell that another run has taken the output over,
    and stop; nor is result.json written then.
    Raises SettingsChangedError where `output` holds another run, RunError where workers failed more often than `scale`
    allows, OutputLockedError where the claim is lost, DivergedError where the weights are not finite any more,
    DataError where the videos do not fit.
    """
    output = storage.absolute(output)  # workers may stand elsewhere
    check_run(run, scale.min_workers or scale.num_workers)
    run = keep_interval(run, output)
    if begin_run(run, model, output):
        return read_result(output)
    with _mailbox(on_metrics) as mailbox:
        told = {"mailbox": mailbox, "tensorboard": tensorboard, "claim": claim}
        arguments = {"run": run, "output": output, "scale": scale, **told}
        trainer = Trainer(
            cleaner=scale.cleaner,
            train_loop_per_worker=run_worker,
            train_loop_config={"arguments": ray.put(arguments)},
            backend_config=ProcessGroup(use_gpu=scale.use_gpu),
            scaling_config=_scaling(scale),
            run_config=RunConfig(
                # By this name under the output Ray finds the checkpoints of a run that was stopped, and goes on.
                name=CHECKPOINTS,
                storage_path=output,
                checkpoint_config=_kept(run),
                failure_config=FailureConfig(max_failures=scale.max_failures),
                callbacks=callbacks,
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            # The message is the traceback of each worker; the error itself is its last line.
            last = str(error).strip().splitlines()[-1]
            remedy = "The same command goes on from the last checkpoint"
            raise RunError(f"the training was given up: {last}. {remedy}") from error
    if claim:
        claim.check()
    # What the first worker's loop returned; one that came to the schedule's end returns nothing.
    if result.return_value:
        raise DivergedError(f"the training diverged: {result.return_value}")
    return _finish(output, run, result)


def _scaling(scale: Scale) -> ScalingConfig:
    workers = (scale.min_workers, scale.num_workers) if scale.min_workers else scale.num_workers
    resources = {"CPU": scale.cpus_per_worker} | ({"GPU": 1.0} if scale.use_gpu else {})
    return ScalingConfig(num_workers=workers, use_gpu=scale.use_gpu, resources_per_worker=resources)


def _kept(run: Run) -> CheckpointConfig:
    """The best by validation beside the last, which Ray never deletes."""
    if run.validation is None:
        return CheckpointConfig(num_to_keep=1)
    return CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE, checkpoint_score_order="max")


def begin_run(run: Run, model: VideoModel, output: str) -> bool:
    """Write run.json and the initial weights, or find in `output` the same run; whether that is finished.

    Raises SettingsChangedError, which names every setting that differs, where it holds another one.
    """
    described = run.describe()
    uri = storage.join(output, RUN)
    if was_begun(uri, described):
        return storage.exists(storage.join(output, RESULT))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, model, run.metadata())
        for path in Path(folder).iterdir():  # before run.json: whoever finds that finds these
            storage.put(storage.join(output, INITIAL, path.name), path.read_bytes())
    storage.put(uri, records.encode(described))
    return False


@contextmanager
def _mailbox(on_metrics: Callable[[Metrics], None] | None, every_s: float = 1.0) -> Iterator[Any]:
    """An actor that workers send lines to; they are handed to `on_metrics` as they come. None where nobody reads."""
    if on_metrics is None:
        yield None
        return

    def deliver(mailbox: Any) -> None:
        for line in ray.get(mailbox.fetch.remote(), timeout=30):  # where it is gone, metrics.jsonl has the lines
            on_metrics(line)

    with polled_actor(Mailbox, deliver, every_s=every_s) as mailbox:
        yield mailbox


def _finish(output: str, run: Run, result: ray.train.Result) -> Result:
    """Write result.json from what Ray kept."""
    checkpoints = [(saved, metrics) for saved, metrics in result.best_checkpoints or [] if metrics]
    assert result.checkpoint is not None, "the loop saves at its last step"
    last = posixpath.basename(result.checkpoint.path)
    best, metrics = last, dict(result.metrics or {})
    if run.validation is not None and checkpoints:
        saved, _ = max(checkpoints, key=lambda pair: pair[1][SCORE])
        best = posixpath.basename(saved.path)
    written = RunResult(last=f"{CHECKPOINTS}/{last}", best=f"{CHECKPOINTS}/{best}", metrics=metrics)
    records.write(storage.join(output, RESULT), written)
    return read_result(output)
