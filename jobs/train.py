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

import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import models
from jobs.cluster import connect, count_processors
from jobs.command import locate_output, run_command
from models.inflation import Mode
from models.input_spec import ModelConfig, Stream
from pipelines import storage
from pipelines.clips.augmentation import Augmentation
from pipelines.clips.sampling import ClipSettings, Protocol, Resize
from pipelines.datasets.video_index import VideoIndex, read_index, with_fold
from pipelines.lock import lock_output
from pipelines.search.space import Geometry, describe_geometry, model_settings, read_outcome
from pipelines.training.config import Optimisation, Reporting, Run, Scale
from pipelines.training.initial_weights import InitialWeights, Source, make_model
from pipelines.training.schedule import PRESETS, Preset, Schedule, drop_at

if TYPE_CHECKING:
    from pipelines.training.trainer import Result

PresetName = Literal["kinetics400_rgb", "kinetics400_flow", "mini_kinetics", "ucf101", "hmdb51", "small", "debug"]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one stream of I3D, or another network, on the shards of jobs/extract_flow.py."""

    data: str
    """Shards, on disk or s3://."""
    output: str
    """Folder of the run, on disk or s3://: checkpoints, metrics, result."""
    model: Literal["i3d", "convnet_lstm", "c3d", "two_stream", "fused_two_stream"] = "i3d"
    """Network; its input spec says what clips it sees."""
    stream: Stream | None = None
    """What the network sees: needed for i3d, rgb by default for convnet_lstm and c3d. fused_two_stream sees both."""

    preset: PresetName | None = None
    """Published schedule, batch, weight decay and dropout. Flags that are given win over it."""
    steps: int | None = None
    """Steps of the run, at the workers and batch that are given."""
    learning_rate: float = 0.05
    """Learning rate of --steps; it falls to a tenth at each of --drops."""
    drops: tuple[float, ...] = (0.6, 0.85)
    """Shares of the steps at which the learning rate falls to a tenth."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises linearly."""

    batch: int | None = None
    """Clips of one worker at a time. None: the preset's, else 6."""
    accumulate: int = 1
    """Batches whose gradients are added up to one step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the convolutions; weights and sums stay fp32. fp16 is for GPUs."""
    weight_decay: float | None = None
    """L2 penalty. None: the preset's, else 1e-7."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    clip_norm: float | None = None
    """Largest norm of a step's gradient. None: any."""
    sync_bn: bool = False
    """Batch norm over all workers' clips (GPUs only)."""

    width: float | None = None
    """Factor of all layers' channels. None: the preset's, else 1."""
    size: int | None = None
    """Side of the crop in pixels. None: the preset's, else the network's own."""
    frames: int | None = None
    """Frames of a training clip, where the network lets one choose."""
    set: tuple[str, ...] = ()
    """Further settings of the network as NAME=VALUE, such as dropout=0.3 or pool_strides=[1,1,1,2]."""
    from_sweep: str | None = None
    """Folder of a finished jobs/tune.py: the best geometry it found, with its learning rate where that was searched."""

    init: Source = "scratch"
    """What the weights begin with: drawn; an ImageNet file, inflated; released Kinetics weights; our checkpoint."""
    weights: str | None = None
    """File, checkpoint or run folder of --init."""
    inflation: Mode = "mean"
    """How 2-D filters become 3-D ones: repeated and divided, or placed at the middle step."""
    finetune: Literal["full", "head"] | None = None
    """Transfer to other classes with a new classifier: train everything (the paper's full-FT) or only it (fixed)."""

    resize: Resize = "shorter"
    """Before the crop: shorter keeps the aspect ratio, square squashes the whole frame."""
    flow_bound: float | None = None
    """Pixels of flow that become 1, after resizing. None: that of the shards, 20 in the paper."""
    flip: float = 0.5
    """Probability that a clip is mirrored; u is negated with it."""
    jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""

    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on. None: val where there is one, else test; `none`: no validation."""
    validation_clips: int = 1
    """Clips of each video that a validation scores, spread over the video."""
    annotations: tuple[str, ...] = ()
    """Official annotation files whose division is used in place of that of the shards."""
    folds: tuple[int, ...] = ()
    """Divisions of --annotations (1, 2 and 3 of UCF-101 and HMDB-51) to train on one after the other."""

    log_every: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every: int | None = None
    """Steps between two validations and checkpoints. None: a tenth of the run, at least 100."""
    seed: int = 0
    """Of initial weights, order, clips and dropout."""

    num_workers: int | None = None
    """Workers, each with a GPU where there are some. None: all GPUs, else all CPUs, of the cluster now."""
    min_workers: int | None = None
    """Go on with as few as these where the cluster has no more; learning rate and steps follow."""
    num_cpus: int | None = None
    """CPUs of a Ray that is started here. None: all."""
    num_gpus: int | None = None
    """0: train on CPUs though there are GPUs."""
    max_failures: int = 3
    """Times that workers may die before the run ends."""

    def __post_init__(self) -> None:
        if self.preset is None and self.steps is None:
            raise ValueError(f"neither --preset ({', '.join(PRESETS)}) nor --steps says how long to train")
        if self.from_sweep and self.model != "i3d":
            raise ValueError(f"--from-sweep chooses a geometry of i3d, and --model is {self.model}")
        if self.folds and not self.annotations:
            raise ValueError("--folds is given but --annotations is not: name the folder of the official lists")
        if self.finetune and self.init == "scratch":
            raise ValueError("--finetune needs weights to start from: give --init and --weights")
        if self.min_workers is not None and not 1 <= self.min_workers <= (self.num_workers or self.min_workers):
            raise ValueError(f"--min-workers is {self.min_workers}: give 1 up to --num-workers")
        for uri in (self.data, self.output, self.weights, self.from_sweep, *self.annotations):
            if uri is not None:
                storage.absolute(uri)


AnyTrain = TypeVar("AnyTrain", bound=Train)


def main() -> None:
    """Parse, train, print."""
    run_command(Train, run, __doc__)


def run(config: Train) -> list[Result]:
    """Train, for each fold where folds are given; prints as it goes."""
    index = read_index(config.data)
    output = locate_output(config.output)
    print(f"data        {index.data}: {len(index):,} videos, {len(index.classes)} classes")
    if config.from_sweep:
        config = take_best(config, config.from_sweep)
    if not config.annotations:
        return [train_one(config, index, output)]
    results = []
    for fold in config.folds or (1,):
        print(f"\nfold        {fold} of {' '.join(config.annotations)}")
        divided = with_fold(index, config.annotations, fold)
        results.append(train_one(config, divided, storage.join(output, f"fold-{fold}")))
    print_mean([test_fold(config, storage.join(output, f"fold-{fold}"), fold) for fold in config.folds or (1,)])
    return results


def take_best(config: Train, sweep: str) -> Train:
    """The flags, with the best geometry of a sweep in place of theirs."""
    best = read_outcome(storage.absolute(sweep))["best"]
    print(f"geometry    {describe_geometry(best['geometry'])}: top-1 {best['top1']:.1%} in {sweep}")
    return apply_geometry(config, best["geometry"])


def apply_geometry(config: AnyTrain, geometry: Geometry) -> AnyTrain:
    """The flags with a geometry's network, and its learning rate and inflation where they were searched."""
    words = {name: value for name, value in model_settings(geometry).items() if name != "frames"}
    return replace(
        config,
        frames=geometry["frames"],
        set=(*config.set, *(f"{name}={json.dumps(value)}" for name, value in words.items())),
        learning_rate=geometry.get("learning_rate", config.learning_rate),
        inflation=geometry.get("inflation", config.inflation),
    )


def test_fold(config: Train, run: str, fold: int) -> float:
    """Top-1 of a fold's run on its test videos, by the paper's protocol; its page lies in the run."""
    from jobs import evaluate

    flag = config.stream if config.model in ("i3d", "two_stream") and config.stream else "model"
    given = evaluate.Evaluate(
        data=config.data,
        output=storage.join(run, "evaluation"),
        annotations=config.annotations,
        fold=fold,
        num_gpus=config.num_gpus,
        **{flag: run},  # type: ignore[arg-type]
    )
    print(f"\nfold        {fold}: evaluation by the paper's protocol")
    return float(evaluate.run(given)["top1"])


def train_one(config: Train, index: VideoIndex, output: str) -> Result:
    """One run on one division of the videos."""
    with lock_output(output):
        num_cpus = max(2, config.num_cpus or os.cpu_count() or 2)  # one to compute and one to decode, be they shares
        print(f"ray         {connect(num_cpus=num_cpus, log_to_driver=False)}", flush=True)
        from pipelines.pages.training import write_training_report
        from pipelines.training.trainer import train

        scale = make_scale(config)
        run = make_run(config, index, scale)
        model = make_model(run.model, make_initial(config), run.train.classes, seed=config.seed)
        run = replace(run, model=model.config)
        print_run(config, run, scale, output)
        result = train(run, model, output, scale, on_metrics=print_metrics)
        page = write_training_report(output)
    print(f"\nlast        {result.last}\nbest        {result.best}\nlook at     {page}")
    return result


def make_scale(config: Train) -> Scale:
    """The workers, from the flags and the cluster at hand."""
    cpus, gpus = count_processors(config.num_workers, config.num_gpus)
    num_workers = config.num_workers or gpus or int(cpus)
    # Half of the CPUs stay for decoding where the workers compute on CPUs themselves.
    cpus_per_worker = 1.0 if gpus else min(1.0, cpus / 2 / num_workers)
    return Scale(
        num_workers=num_workers,
        min_workers=config.min_workers,
        use_gpu=gpus > 0,
        cpus_per_worker=round(cpus_per_worker, 3),
        max_failures=config.max_failures,
    )


def make_run(config: Train, index: VideoIndex, scale: Scale) -> Run:
    """The run that the flags mean."""
    preset = PRESETS[config.preset] if config.preset else None
    optimisation = make_optimisation(config, preset, scale)
    steps = optimisation.schedule.steps(optimisation.global_batch(scale.num_workers))
    bound = config.flow_bound or float(index.convention["flow"]["bound_px"])
    return Run(
        model=make_model_config(config, preset, num_classes=len(index.classes)),
        clips=ClipSettings(resize=config.resize, flow_bound=bound, short_side=index.short_side),
        augmentation=Augmentation(flip=config.flip, jitter=config.jitter),
        optimisation=optimisation,
        reporting=Reporting(
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every or max(100, steps // 10),
            validation=Protocol(num_clips=config.validation_clips),
        ),
        seed=config.seed,
        initial=make_initial(config).describe(),
        train=index.of_split(config.train_split).usable(),
        validation=find_validation(config, index),
    )


def make_initial(config: Train) -> InitialWeights:
    """What the weights begin with."""
    return InitialWeights(
        source=config.init, weights=config.weights, inflation=config.inflation, new_head=config.finetune is not None
    )


def make_optimisation(config: Train, preset: Preset | None, scale: Scale) -> Optimisation:
    """Schedule and optimizer; --steps counts steps at hand, a preset those of its own batch."""
    if not scale.use_gpu and (config.sync_bn or config.precision == "fp16"):
        raise ValueError(
            "--sync-bn and --precision fp16 need GPUs, and this run has none: leave them out, or take bf16"
        )
    batch = config.batch or (preset.batch if preset else 6)
    warmup = config.warmup_steps if config.warmup_steps is not None else (preset.warmup_steps if preset else 0)
    if config.steps is not None or preset is None:
        assert config.steps is not None, "checked by the settings"
        phases = drop_at(config.steps, config.learning_rate, config.drops)
        reference = batch * config.accumulate * scale.num_workers
    else:
        phases, reference = preset.phases, preset.reference_batch
    weight_decay = config.weight_decay if config.weight_decay is not None else preset.weight_decay if preset else 1e-7
    return Optimisation(
        schedule=Schedule(phases=phases, reference_batch=reference, warmup_steps=warmup),
        batch=batch,
        accumulate=config.accumulate,
        weight_decay=weight_decay,
        label_smoothing=config.label_smoothing,
        clip_norm=config.clip_norm,
        precision=config.precision,
        sync_bn=config.sync_bn,
        train_only_head=config.finetune == "head",
    )


def make_model_config(config: Train, preset: Preset | None, *, num_classes: int) -> ModelConfig:
    """The network's settings: the preset's that it knows, then the flags, then --set."""
    known = models.setting_names(config.model)
    settings = {name: value for name, value in (preset.model if preset else {}).items() if name in known}
    if config.model != "i3d":
        settings.pop("frames", None)  # the others keep the clips of their papers
    flags = {"width": config.width, "size": config.size, "frames": config.frames, "stream": config.stream}
    settings |= {name: value for name, value in flags.items() if value is not None}
    if config.model == "i3d" and config.stream is None:
        raise ValueError("i3d sees one stream: give --stream rgb or --stream flow")
    return models.configure(config.model, num_classes=num_classes, **settings | _parse_set(config.set))  # type: ignore[arg-type]


def _parse_set(words: tuple[str, ...]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: give NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def find_validation(config: Train, index: VideoIndex) -> VideoIndex | None:
    """The labelled videos of the validation split; None where there is to be none."""
    splits = set(index.table["split"].to_pylist())
    split = config.validation_split or next((name for name in ("val", "test") if name in splits), "none")
    return None if split == "none" else index.of_split(split).usable()


def print_run(config: Train, run: Run, scale: Scale, output: str) -> None:
    """What will be done, the scaling of a published schedule said aloud."""
    optimisation, schedule = run.optimisation, run.optimisation.schedule
    batch = optimisation.global_batch(scale.num_workers)
    device = "GPU" if scale.use_gpu else "CPU"
    phases = ", ".join(f"{rate:g} for {steps:,}" for steps, rate in schedule.phases)
    print(f"model       {config.model} {config.stream or ''}: {run.initial}; {optimisation.precision}")
    print(f"videos      {len(run.train):,} to train, {len(run.validation or ()):,} to validate")
    print(f"schedule    {phases} steps of {schedule.reference_batch} clips")
    if batch != schedule.reference_batch:
        factor = batch / schedule.reference_batch
        print(
            f"scaled      to steps of {batch} clips: learning rates × {factor:.4g}, "
            f"{schedule.steps(batch):,} steps (linear scaling; the clips seen stay {schedule.clips:,})"
        )
    if config.preset:
        print(f"preset      {config.preset}: {PRESETS[config.preset].source}")
    print(
        f"workers     {scale.num_workers} {device}s, {optimisation.batch} × {optimisation.accumulate} clips each a step"
    )
    print(f"output      {output}", flush=True)


def print_metrics(line: dict[str, object]) -> None:
    """One line of metrics, for a terminal or `ray job logs`."""
    step = f"step {line['step']:>7,}"
    if line["kind"] == "validation":
        failed = f", {line['val_failed']} could not be decoded" if line["val_failed"] else ""
        text = f"validation: top-1 {line['val_top1']:.1%} of {line['val_videos']:,} videos, loss {line['val_loss']:.3f}"
        print(f"{step}  {text}{failed}", flush=True)
        return
    failed = f", {line['failed']} clips could not be decoded" if line["failed"] else ""
    print(
        f"{step}  epoch {line['epoch']:.1f}  lr {line['learning_rate']:.4g}  loss {line['loss']:.3f}  "
        f"top-1 {line['top1']:.1%}  {line['clips_per_s']:.1f} clips/s  {line['wait_share']:.1%} waiting{failed}",
        flush=True,
    )
    for error in line.get("errors", ()):  # type: ignore[attr-defined]
        print(f"            not decoded: {error}", flush=True)


def print_mean(scores: list[float]) -> None:
    """Each fold's accuracy, and their mean."""
    each = ", ".join(f"{score:.1%}" for score in scores)
    print(f"\nfolds       top-1 {each}; mean {sum(scores) / len(scores):.1%}")


if __name__ == "__main__":
    main()
