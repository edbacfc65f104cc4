"""What a search may choose of I3D's temporal geometry, and what the paper chose; no Ray.

A choice is a name and a value; a geometry is one value for each name. Flow at input stride s is every s-th frame of the
flow between neighbouring frames, not the flow over s frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from tyro import conf
from tyro.conf import arg

from models.inception import POOLS, TemporalExtents
from models.inflation import Mode
from pipelines.errors import SettingsError
from pipelines.records import Values
from pipelines.training.settings import TrainingSettings

Geometry = Mapping[str, int | float | str]

PAPER = TemporalExtents()
POOL_CHOICES = tuple(name.split("_")[1] for name in POOLS)  # 2a, 3a, 4a, 5a
# Settings of I3DConfig that follow from a geometry.
SEARCHED = ("frames", "frame_step", "test_frames", "conv1_kernel", "conv1_stride", "pool_kernels", "pool_strides")
TEST_SPAN = 250  # frames of a test video that are looked at, whatever the stride


@dataclass(frozen=True, kw_only=True)
class Space:
    """The values of each choice. The paper's are among them, or are added: they are always tried first.

    `paper_frames` and `paper_learning_rate` are those of the paper's trial: what the training's settings say.
    """

    frames: Annotated[tuple[int, ...], arg(name="search-frames")] = ()
    """Frames of a training clip to try besides those of the network."""
    frame_steps: Annotated[tuple[int, ...], arg(name="search-frame-steps")] = (1, 2, 4)
    """Input strides: 2 keeps every second frame."""
    conv1_kernels: Annotated[tuple[int, ...], arg(name="search-conv1-kernels")] = (3, 5, 7)
    """Temporal kernels of conv1."""
    conv1_strides: Annotated[tuple[int, ...], arg(name="search-conv1-strides")] = (1, 2)
    """Temporal strides of conv1."""
    pool_kernels: Annotated[tuple[int, ...], arg(name="search-pool-kernels")] = (1, 2, 3)
    """Temporal kernels of each of the four max-pools; 1 leaves a pool uninflated."""
    pool_strides: Annotated[tuple[int, ...], arg(name="search-pool-strides")] = (1, 2)
    """Temporal strides of each of the four max-pools."""
    inflation: Annotated[tuple[Mode, ...], arg(name="search-inflation")] = ()
    """Ways to inflate 2-D weights, with --init imagenet. Empty: not searched."""
    learning_rate: Annotated[tuple[float, float] | None, arg(name="search-learning-rate")] = None
    """Lowest and highest learning rate, searched on a logarithmic scale. None: not searched."""
    paper_frames: Annotated[int, conf.Suppress] = 0
    paper_learning_rate: Annotated[float | None, conf.Suppress] = None

    def __post_init__(self) -> None:
        if self.learning_rate and not 0 < self.learning_rate[0] < self.learning_rate[1]:
            raise SettingsError(f"--search-learning-rate is {self.learning_rate}: give the lowest and the highest")

    def distributions(self) -> dict[str, BaseDistribution]:
        """Each choice as Optuna takes it."""
        tried: dict[str, tuple[int | str, ...]] = {
            "frame_step": self.frame_steps,
            "frames": self.frames,
            "conv1_kernel": self.conv1_kernels,
            "conv1_stride": self.conv1_strides,
            **{f"pool_{pool}_kernel": self.pool_kernels for pool in POOL_CHOICES},
            **{f"pool_{pool}_stride": self.pool_strides for pool in POOL_CHOICES},
            "inflation": self.inflation,
        }
        distributions: dict[str, BaseDistribution] = {
            # In one order, whatever that of the flags: to Optuna choices in another order are another distribution.
            name: CategoricalDistribution(tuple(sorted({value, *tried[name]})))
            # By the paper's names, which leave out what is not searched, such as inflation.
            for name, value in self.paper().items()
            if name in tried
        }
        if self.learning_rate:
            distributions["learning_rate"] = FloatDistribution(*self.learning_rate, log=True)
        return distributions

    def paper(self) -> Geometry:
        """The paper's own geometry (Figure 3), at the learning rate of the run."""
        chosen: dict[str, int | float | str] = {
            "frame_step": 1,
            "frames": self.paper_frames,
            "conv1_kernel": PAPER.conv1_kernel,
            "conv1_stride": PAPER.conv1_stride,
        }
        for index, pool in enumerate(POOL_CHOICES):
            chosen[f"pool_{pool}_kernel"] = PAPER.pool_kernels[index]
            chosen[f"pool_{pool}_stride"] = PAPER.pool_strides[index]
        if self.inflation:
            chosen["inflation"] = "mean"  # section 2.4.1
        if self.learning_rate:
            low, high = self.learning_rate
            # The run's own rate may lie outside of what is searched.
            chosen["learning_rate"] = min(max(self.paper_learning_rate or low, low), high)
        return chosen


def identify(geometry: Geometry) -> str:
    """A short name that equal geometries share."""
    # Keys in order: a geometry from a file, or from Optuna, has them in an order of its own.
    return hashlib.sha256(json.dumps(dict(geometry), sort_keys=True).encode()).hexdigest()[:10]


def model_settings(geometry: Geometry) -> Values:
    """The settings of I3DConfig that a geometry means."""
    frames, frame_step = int(geometry["frames"]), int(geometry["frame_step"])
    return {
        "frames": frames,
        "frame_step": frame_step,
        "test_frames": max(frames, TEST_SPAN // frame_step),  # the same seconds of video at each stride
        "conv1_kernel": geometry["conv1_kernel"],
        "conv1_stride": geometry["conv1_stride"],
        "pool_kernels": tuple(geometry[f"pool_{pool}_kernel"] for pool in POOL_CHOICES),
        "pool_strides": tuple(geometry[f"pool_{pool}_stride"] for pool in POOL_CHOICES),
    }


def with_geometry(settings: TrainingSettings, geometry: Geometry) -> TrainingSettings:
    """The settings of a training with a geometry's network, and its learning rate and inflation where searched."""
    words = {name: value for name, value in model_settings(geometry).items() if name != "frames"}
    chosen = tuple(f"{name}={json.dumps(value)}" for name, value in words.items())
    network, rate, inflation = settings.network, settings.schedule.learning_rate, settings.initial.inflation
    return settings.change(
        # Last: of two values that --set gives one name the later counts.
        network={"frames": int(geometry["frames"]), "set": (*network.set, *chosen), "searched": True},
        schedule={"learning_rate": geometry.get("learning_rate", rate)},
        initial={"inflation": geometry.get("inflation", inflation)},
    )


def check_given(settings: TrainingSettings, geometry: Geometry) -> None:
    """SettingsError where a flag of the settings says otherwise than a search, whose geometry would take its place."""
    frames, rate = settings.network.frames, settings.schedule.learning_rate
    refused = [f"--set {word}" for word in searched_words(settings)]
    if frames is not None and frames != geometry["frames"]:
        refused.append(f"--frames {frames}")
    if rate is not None and rate != geometry.get("learning_rate", rate):
        refused.append(f"--learning-rate {rate:g}")
    if refused:
        raise SettingsError(
            f"{' '.join(refused)} and --from-sweep both say it, and the search found {describe_geometry(geometry)}: "
            "leave one of them out"
        )


def searched_words(settings: TrainingSettings) -> list[str]:
    """The words of --set for what a search chooses."""
    return [word for word in settings.network.set if word.partition("=")[0] in SEARCHED]


def describe_geometry(geometry: Geometry) -> str:
    """A line such as `16 frames, conv1 7/2, pools 1/1 1/1 3/2 2/2` (kernel/stride)."""
    pools = " ".join(f"{geometry[f'pool_{pool}_kernel']}/{geometry[f'pool_{pool}_stride']}" for pool in POOL_CHOICES)
    step = f" every {geometry['frame_step']}" if int(geometry["frame_step"]) > 1 else ""
    rate = f", learning rate {geometry['learning_rate']:.3g}" if "learning_rate" in geometry else ""
    inflation = f", {geometry['inflation']} inflation" if "inflation" in geometry else ""
    conv1 = f"{geometry['conv1_kernel']}/{geometry['conv1_stride']}"
    return f"{geometry['frames']} frames{step}, conv1 {conv1}, pools {pools}{rate}{inflation}"
