"""Train a network on shards.

    python jobs/train.py --data SHARDS --stream flow --preset debug --output RUN      seconds, to see that it runs
    python jobs/train.py --data SHARDS --stream rgb --preset kinetics400_rgb --num-workers 64 --output s3://bucket/rgb
    python jobs/train.py --data UCF --stream flow --preset ucf101 --init kinetics --weights flow_imagenet.pt \\
        --finetune full --annotations ucfTrainTestlist --folds 1 2 3 --output RUN
    python jobs/train.py --data SHARDS --from-sweep SWEEP --stream flow --preset small --output RUN
    ray job submit --working-dir . -- python jobs/train.py …                          the same on a cluster

Stopped or killed, it goes on from its last checkpoint when the same command is run again.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from jobs.cluster import check_counts, connect, count_own_gpus, count_processors, is_submitted
from jobs.command import as_given, locate_output, run_command, with_preset
from models import cuda
from pipelines import storage
from pipelines.datasets.video_index import VideoIndex, check_trainable, read_index, with_fold
from pipelines.errors import SettingsError
from pipelines.formatting import format_count
from pipelines.lock import lock_output
from pipelines.search.records import read_outcome
from pipelines.search.space import check_given, describe_geometry, with_geometry
from pipelines.training.config import Run, Scale
from pipelines.training.records import RESULT
from pipelines.training.results import Result, find_result
from pipelines.training.settings import PRESETS, PresetName, TrainingSettings, prepare
from pipelines.training.tracking import TrackerName, track

MOST_WAITING = 0.05  # of a GPU's time for clips, about which nothing is said


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of a training."""

    num_workers: int | None = None
    """Number of workers, each on a GPU if there are any. None: one per GPU the cluster has now, or one per CPU."""
    min_workers: int | None = None
    """Continue with as few workers as this if the cluster has no more; learning rate and steps are scaled."""
    num_cpus: int | None = None
    """CPUs of the Ray instance that the job starts on this machine. None: all."""
    num_gpus: int | None = None
    """GPUs to use. None: all; 0: train on CPUs."""
    max_failures: int = 3
    """How often workers may die before the run ends."""
    compile: bool = False
    """Compile the network by torch.compile (GPUs only): faster steps, after more than a minute of compiling."""
    cuda_graphs: bool = True
    """Record the launches of a step and replay them, where one GPU trains without --accumulate: the same steps, without
    waiting for the CPU that launches them."""

    def __post_init__(self) -> None:
        check_counts(num_workers=self.num_workers, num_cpus=self.num_cpus, num_gpus=self.num_gpus)
        if self.max_failures < 0:
            raise SettingsError(f"--max-failures is {self.max_failures}: give 0 or more")
        if self.min_workers is not None and not 1 <= self.min_workers <= (self.num_workers or self.min_workers):
            raise SettingsError(f"--min-workers is {self.min_workers}: give 1 up to --num-workers")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one stream of I3D, or another network, on the shards of jobs/extract_flow.py."""

    data: str
    """Shards, on disk or s3://."""
    output: str
    """Folder of the run, on disk or s3://: checkpoints, metrics, result."""
    preset: PresetName | None = None
    """Published schedule, batch, weight decay and dropout. Any other flag overrides it."""
    from_sweep: str | None = None
    """Folder of a finished jobs/tune.py: the best geometry it found, with its learning rate where that was searched."""
    annotations: tuple[str, ...] = ()
    """Official annotation files whose splits replace those of the shards."""
    folds: tuple[int, ...] = ()
    """Official splits of --annotations (1, 2 and 3 of UCF-101 and HMDB-51) to train on, one after the other."""
    tracker: TrackerName = "tensorboard"
    """Where the curves go besides metrics.jsonl: TensorBoard's files in the output, or the server that
    MLFLOW_TRACKING_URI or WANDB_BASE_URL names."""
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    """What determines the weights."""
    workers: Workers = field(default_factory=Workers)
    """The workers of a training."""

    def __post_init__(self) -> None:
        if self.preset and self.settings.source != PRESETS[self.preset].source:
            raise SettingsError(f"preset is {self.preset}, but the settings are others: give settings=PRESETS[…]")
        if self.from_sweep and self.settings.network.model != "i3d":
            raise SettingsError(f"--from-sweep chooses a geometry of i3d, and --model is {self.settings.network.model}")
        if self.folds and not self.annotations:
            raise SettingsError("--folds is given but --annotations is not: name the folder of the official lists")
        # For its errors alone: a schedule that cannot be is refused before any work.
        self.settings.schedule.resolve(1)
        for uri in (self.data, self.output, self.settings.initial.weights, self.from_sweep, *self.annotations):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, train, print."""
    run_command(with_preset(Train, PRESETS), run, __doc__)


def run(config: Train) -> list[Result]:
    """Train, for each fold where folds are given; prints as it goes."""
    index = read_index(config.data)
    output = locate_output(config.output)
    print(f"data        {index.data}: {format_count(len(index), 'video')}, {format_count(len(index.classes), 'class')}")
    settings = take_best(config.settings, config.from_sweep) if config.from_sweep else config.settings
    if not config.annotations:
        return [train_one(config, settings, index, output)]
    results, scores = [], []
    for fold in config.folds or (1,):
        print(f"\nfold        {fold} of {' '.join(config.annotations)}")
        folder = storage.join(output, f"fold-{fold}")
        # A folder for each fold: a run that is resumed must find its own checkpoints.
        results.append(train_one(config, settings, with_fold(index, config.annotations, fold), folder))
    for fold in config.folds or (1,):
        scores.append(test_fold(config, storage.join(output, f"fold-{fold}"), fold))
    print_mean(scores)
    return results


def take_best(settings: TrainingSettings, search: str) -> TrainingSettings:
    """The settings, with the best geometry of a search in place of theirs."""
    best = read_outcome(storage.absolute(search)).best
    check_given(settings, best.geometry)
    print(f"geometry    {describe_geometry(best.geometry)}: top-1 {best.top1:.1%} in {search}")
    return with_geometry(settings, best.geometry)


def test_fold(config: Train, run: str, fold: int) -> float:
    """Top-1 of a fold's run on its test videos, by the paper's protocol; its page lies in the run."""
    from jobs import evaluate

    network = config.settings.network
    # By the flag of its stream, which checks that the run is of it; other networks go by --model.
    flag = network.stream if network.model in ("i3d", "two_stream") and network.stream else "model"
    given = evaluate.Evaluate(
        data=config.data,
        output=storage.join(run, "evaluation"),
        annotations=config.annotations,
        fold=fold,
        num_gpus=config.workers.num_gpus,
        **{flag: run},  # type: ignore[arg-type]
    )
    print(f"\nfold        {fold}: evaluation by the paper's protocol")
    top1 = evaluate.run(given).top1
    assert top1 is not None, "a split that is there has videos"
    return top1


def train_one(config: Train, settings: TrainingSettings, index: VideoIndex, output: str) -> Result:
    """One run on one division of the videos."""
    for note in check_trainable(index, config.settings.splits.train_split):
        print(f"note        {note}")
    # The lock before Ray: a second command on this folder ends at once.
    with lock_output(output) as lock, lock.stop_run_when_lost():
        page = storage.join(output, "report.html")
        if (result := find_finished(config.workers, settings, index, output)) and storage.exists(page):
            print(f"to do       nothing: {output} is finished")
            print_result(result, page, output, as_given(output, config.output))
            return result
        print(f"ray         {connect(num_cpus=embedded_cpus(config.workers), log_to_driver=False)}", flush=True)
        # Not at the top: Ray reads its environment when it is imported, and `connect` sets it.
        from pipelines.pages.training import write_training_report
        from pipelines.training.trainer import train

        scale = make_scale(config.workers)
        # After the scale: how many clips a step has, and so how many steps there are, follows from the workers.
        run, model = prepare(settings, index, scale)
        print_run(config, run, scale, as_given(output, config.output))
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else its library reports to its authors
        with track(config.tracker, output, run.describe()) as send:
            notes = WaitNotes(scale)

            def tell(line: dict[str, Any]) -> None:
                print_metrics(line)
                if note := notes.of(line):
                    print(f"note        {note}", flush=True)
                send(line)

            tensorboard = config.tracker == "tensorboard"
            result = train(run, model, output, scale, on_metrics=tell, tensorboard=tensorboard, claim=lock.claim)
        page = write_training_report(output)
    print_result(result, page, output, as_given(output, config.output))
    return result


def find_finished(workers: Workers, settings: TrainingSettings, index: VideoIndex, output: str) -> Result | None:
    """The result of this training where it is finished, found without Ray; None on a cluster, whose size Ray knows."""
    if is_submitted() or not storage.exists(storage.join(output, RESULT)):
        return None
    gpus = count_own_gpus() if workers.num_gpus is None else workers.num_gpus
    run, _ = prepare(settings, index, make_scale(workers, (float(embedded_cpus(workers)), gpus)))
    return find_result(run, output)


def embedded_cpus(workers: Workers) -> int:
    """CPUs of a Ray that is started here: at least one to compute and one to decode, be they shares."""
    return max(2, workers.num_cpus or os.cpu_count() or 2)


def make_scale(workers: Workers, processors: tuple[float, int] | None = None) -> Scale:
    """The workers, from the flags and the CPUs and GPUs to use; None: those of the cluster at hand."""
    cpus, gpus = processors or count_processors(workers.num_workers, workers.num_gpus)
    num_workers = workers.num_workers or gpus or int(cpus)
    # Half of the CPUs stay for decoding where the workers compute on CPUs themselves.
    cpus_per_worker = 1.0 if gpus else min(1.0, cpus / 2 / num_workers)
    return Scale(
        num_workers=num_workers,
        min_workers=workers.min_workers,
        use_gpu=gpus > 0,
        cpus_per_worker=round(cpus_per_worker, 3),
        max_failures=workers.max_failures,
        compile=workers.compile,
        cuda_graphs=workers.cuda_graphs,
        cleaner=is_submitted(),
    )


class WaitNotes:
    """Says once in a training on GPUs that their clips do not come fast enough, and how many CPUs would cut them."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.lines = 0  # of steps that were looked at; the first one is of the start
        self.said = not scale.use_gpu

    def of(self, line: dict[str, Any]) -> str | None:
        """The note that a line of metrics asks for."""
        if self.said or line["kind"] == "validation":
            return None
        self.lines += 1
        self.said = self.lines > 1 and line["wait_share"] > MOST_WAITING
        return describe_waiting(line["wait_share"], self.count_cpus()) if self.said else None

    def count_cpus(self) -> float:
        """CPUs of the cluster now that cut clips."""
        from pipelines.training.worker import count_data_cpus

        return self.scale.num_workers * count_data_cpus(self.scale, self.scale.num_workers)


def describe_waiting(share: float, cpus: float) -> str:
    """That GPUs waited a share of their time for clips that so many CPUs cut, and what helps."""
    enough = math.ceil(cpus / max(1 - share, 0.01))
    return (
        f"the GPUs waited {share:.0%} of the time for clips: {format_count(round(cpus), 'CPU')} cut them, "
        f"about {enough} would keep up; --repeats 2 cuts two clips of each decoded window"
    )


def print_run(config: Train, run: Run, scale: Scale, output: str) -> None:
    """What will be done, and how a published schedule was scaled."""
    optimisation, schedule, network = run.optimisation, run.schedule, config.settings.network
    batch = optimisation.global_batch(scale.num_workers)
    device = "GPU" if scale.use_gpu else "CPU"
    phases = ", ".join(f"{rate:g} for {steps:,}" for steps, rate in schedule.phases)
    precision = cuda.describe(optimisation.precision, training=True) if scale.use_gpu else optimisation.precision
    print(f"model       {network.model} {network.stream or ''}: {run.initial}; {precision}")
    print(f"videos      {len(run.train):,} to train, {len(run.validation or ()):,} to validate")
    print(f"schedule    {phases} steps of {format_count(schedule.reference_batch, 'clip')}")
    if batch != schedule.reference_batch:
        # Goyal et al. 2017: the rate grows with the batch, so that as many clips move the weights as far.
        factor = batch / schedule.reference_batch
        print(
            f"scaled      to steps of {format_count(batch, 'clip')}: learning rates × {factor:.4g}, "
            f"{format_count(schedule.steps(batch), 'step')} (linear scaling; the clips seen stay {schedule.clips:,})"
        )
    if config.preset:
        print(f"preset      {config.preset}: {config.settings.source}")
    print(
        f"workers     {format_count(scale.num_workers, device)}, {optimisation.batch} × "
        f"{optimisation.accumulate} clips each a step"
    )
    print(f"output      {output}", flush=True)


def print_result(result: Result, page: str, output: str, given: str) -> None:
    """Where to go on, with the output as it was given."""
    last, best, look = (given + uri.removeprefix(output) for uri in (result.last, result.best, page))
    print(f"\nlast        {last}\nbest        {best}\nlook at     {look}")


def print_metrics(line: dict[str, Any]) -> None:
    """One line of metrics, for a terminal or `ray job logs`."""
    step = f"step {line['step']:>7,}"
    if line["kind"] == "validation":
        failed = f", {line['val_failed']} could not be decoded" if line["val_failed"] else ""
        text = (
            f"validation: top-1 {line['val_top1']:.1%} of "
            f"{format_count(line['val_videos'], 'video')}, loss {line['val_loss']:.3f}"
        )
    else:
        failed = f", {format_count(line['failed'], 'clip')} could not be decoded" if line["failed"] else ""
        text = (
            f"epoch {line['epoch']:.1f}  lr {line['learning_rate']:.4g}  loss {line['loss']:.3f}  "
            f"top-1 {line['top1']:.1%}  {line['clips_per_s']:.1f} clips/s  {line['wait_share']:.1%} waiting"
        )
    print(f"{step}  {text}{failed}", flush=True)
    for error in line.get("errors", ()):
        print(f"            not decoded: {error}", flush=True)


def print_mean(scores: list[float]) -> None:
    """Each fold's accuracy, and their mean."""
    each = ", ".join(f"{score:.1%}" for score in scores)
    print(f"\nfolds       top-1 {each}; mean {sum(scores) / len(scores):.1%}")


if __name__ == "__main__":
    main()
