"""What a training is asked to be: settings that flags, presets and Python share, and the run that they mean.

    settings = PRESETS["debug"].change(network={"stream": "flow"}, schedule={"steps": 60})
    run, model = prepare(settings, read_index("out/debug/shards"), scale)
    result = train(run, model, "out/debug/flow", scale)

A preset is a value like any other; a flag of jobs/train.py replaces a part of it. Settings become a run when data and
workers are known: classes, the flow's bound and the videos come from the data, a step's clips from the workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from tyro import conf

import models
from models.input_spec import ModelConfig, Stream
from models.video_model import VideoModel
from pipelines.clips.augmentation import Augmentation
from pipelines.clips.sampling import ClipSettings
from pipelines.datasets.video_index import VideoIndex, check_labels
from pipelines.errors import SettingsError
from pipelines.training.config import Optimisation, Reporting, Run, Scale
from pipelines.training.initial_weights import InitialWeights, make_model
from pipelines.training.schedule import ScheduleSettings

ModelName = Literal["i3d", "convnet_lstm", "c3d", "two_stream", "fused_two_stream"]
PresetName = Literal["kinetics400_rgb", "kinetics400_flow", "mini_kinetics", "ucf101", "hmdb51", "small", "debug"]


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Which network, and its size."""

    model: ModelName = "i3d"
    """The network. Each has its own clip length and size."""
    stream: Stream | None = None
    """Input stream: required for i3d; rgb by default for convnet_lstm and c3d. fused_two_stream takes both."""
    width: float | None = None
    """Multiplier for the number of channels in every layer. None: the preset's, else 1."""
    size: int | None = None
    """Side of the crop in pixels. None: the preset's, else the network's own."""
    frames: int | None = None
    """Frames per training clip, for networks that allow a choice. None: the preset's, else the network's own."""
    set: tuple[str, ...] = ()
    """Further settings of the network as NAME=VALUE, such as dropout=0.3 or pool_strides=[1,1,1,2]."""
    defaults: Annotated[Mapping[str, object], conf.Suppress, conf.Fixed] = field(default_factory=dict)
    """A preset's settings, for networks that have them."""
    searched: Annotated[bool, conf.Suppress, conf.Fixed] = False
    """Whether a search chose the temporal geometry, with the initial weights that there are."""

    def configure(self, num_classes: int) -> ModelConfig:
        """The network's settings: the preset's that it knows, then the flags, then --set. Raises SettingsError."""
        if self.model == "i3d" and self.stream is None:
            raise SettingsError("i3d sees one stream: give --stream rgb or --stream flow")
        known = models.setting_names(self.model)
        settings = {name: value for name, value in self.defaults.items() if name in known}
        if self.model != "i3d":
            settings.pop("frames", None)  # the others keep the clips of their papers
        flags = {"width": self.width, "size": self.size, "frames": self.frames, "stream": self.stream}
        settings |= {name: value for name, value in flags.items() if value is not None}
        try:
            return models.configure(self.model, num_classes=num_classes, **settings | _parse(self.set))  # type: ignore[arg-type]
        except ValueError as error:
            raise SettingsError(f"--model {self.model}: {error}") from error


def _parse(words: tuple[str, ...]) -> dict[str, object]:
    """NAME=VALUE as names and values; a value that is no JSON is text."""
    settings: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(f"--set {word}: give NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which videos a network is trained on and validated on."""

    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on. None: val if there is one, else test, but for that trained on; `none`: no validation."""

    def train(self, index: VideoIndex) -> VideoIndex:
        """The labelled videos to train on."""
        return index.of_split(self.train_split).usable()

    def validation(self, index: VideoIndex) -> VideoIndex | None:
        """The labelled videos to validate on; None where there are to be none."""
        # What is trained on tells nothing of other videos; who wants it names it.
        splits = set(index.table["split"].to_pylist()) - {self.train_split}
        split = self.validation_split or next((name for name in ("val", "test") if name in splits), "none")
        return None if split == "none" else index.of_split(split).usable()


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Everything that a training is asked to be."""

    network: NetworkSettings = field(default_factory=NetworkSettings)
    """The network."""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """How long, and the learning rate."""
    optimisation: Optimisation = field(default_factory=Optimisation)
    """A step of the optimizer."""
    initial: InitialWeights = field(default_factory=InitialWeights)
    """The weights that training begins with."""
    clips: ClipSettings = field(default_factory=ClipSettings)
    """How frames become clips."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """What training changes at random."""
    splits: Splits = field(default_factory=Splits)
    """The videos."""
    reporting: Reporting = field(default_factory=Reporting)
    """What a run says and saves on its way."""
    seed: int = 0
    """Seed of the initial weights, the order of videos, the clips and dropout."""
    source: Annotated[str, conf.Suppress] = ""
    """Where a preset's numbers are published."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SettingsError(f"--seed is {self.seed}: give at least 0")

    def change(self, *, seed: int | None = None, **groups: Mapping[str, object]) -> TrainingSettings:
        """The same but for some values of some groups: `settings.change(network={"stream": "flow"})`."""
        changed = {name: replace(getattr(self, name), **values) for name, values in groups.items()}
        return replace(self, **changed, seed=self.seed if seed is None else seed)


def prepare(settings: TrainingSettings, index: VideoIndex, scale: Scale) -> tuple[Run, VideoModel]:
    """The run that the settings mean on these videos with these workers, and its network with the initial weights.

    Raises SettingsError, DataError and NetworkError.
    """
    run = make_run(settings, index, scale)
    model = make_model(
        run.model,
        settings.initial,
        run.train.classes,
        seed=settings.seed,
        clips=run.clips,
        searched=settings.network.searched,
    )
    return replace(run, model=model.config), model


def make_run(settings: TrainingSettings, index: VideoIndex, scale: Scale) -> Run:
    """The run that the settings mean; what the initial weights decide about the network is not in it yet."""
    check_labels(index)
    optimisation = settings.optimisation
    if not scale.use_gpu and (optimisation.sync_bn or scale.compile or optimisation.precision == "fp16"):
        raise SettingsError(
            "--sync-bn, --compile and --precision fp16 need GPUs, and this run has none: leave them out, or use bf16"
        )
    bound = settings.clips.flow_bound or float(index.convention.flow["bound_px"])
    return Run(
        model=settings.network.configure(len(index.classes)),
        clips=replace(settings.clips, flow_bound=bound).of_frames(index.sampling),
        augmentation=settings.augmentation,
        optimisation=optimisation,
        schedule=settings.schedule.resolve(optimisation.global_batch(scale.num_workers)),
        train_only_head=settings.initial.finetune == "head",
        reporting=settings.reporting,
        seed=settings.seed,
        initial=settings.initial.describe(),
        train=settings.splits.train(index),
        validation=settings.splits.validation(index),
    )


def _preset(
    network: Mapping[str, object], schedule: ScheduleSettings, *, batch: int = 6, source: str
) -> TrainingSettings:
    return TrainingSettings(
        network=NetworkSettings(defaults=network),
        schedule=schedule,
        optimisation=Optimisation(batch=batch),
        source=source,
    )


_PAPER = {"dropout": 0.5}
_TRANSFER = _preset(
    _PAPER,
    ScheduleSettings(phases=((3_500, 0.05), (1_000, 0.005), (500, 0.0005)), reference_batch=96),
    source="paper, section 3: 16 GPUs of 6 clips, up to 5k steps; rate and drops are ours",
)
# 64 replicas of 6 clips; the flow checkpoint was trained on with a second rise of the rate.
PRESETS: dict[PresetName, TrainingSettings] = {
    "kinetics400_rgb": _preset(
        _PAPER,
        ScheduleSettings(phases=((97_000, 0.1), (11_000, 0.01), (7_000, 0.001)), reference_batch=384),
        source="the released RGB checkpoint's README: 115k steps of 384 clips",
    ),
    "kinetics400_flow": _preset(
        _PAPER,
        ScheduleSettings(
            phases=((97_000, 0.1), (7_500, 0.01), (10_500, 0.001), (25_000, 0.1), (10_000, 0.01), (5_000, 0.001)),
            reference_batch=384,
        ),
        source="the released flow checkpoint's README: 155k steps of 384 clips",
    ),
    "mini_kinetics": _preset(
        _PAPER,
        ScheduleSettings(phases=((30_000, 0.1), (3_500, 0.01), (1_500, 0.001)), reference_batch=384),
        source="paper, version 1: up to 35k steps on miniKinetics; the drops are ours, it says by hand at saturation",
    ),
    "ucf101": _TRANSFER,
    "hmdb51": _TRANSFER,
    "small": _preset(
        {"width": 0.25, "size": 64, "frames": 32, "bn_momentum": 0.05, "dropout": 0.5},
        ScheduleSettings(phases=((960, 0.02), (400, 0.002), (240, 0.0002)), reference_batch=8, warmup_steps=50),
        batch=4,
        source="ours, for a few dozen videos on a CPU (benchmarks/ut_interaction.py)",
    ),
    "debug": _preset(
        {"width": 0.125, "size": 32, "frames": 16, "bn_momentum": 0.1},
        ScheduleSettings(phases=((20, 0.05),), reference_batch=8),
        batch=4,
        source="a few seconds on a CPU, to see that everything runs",
    ),
}
