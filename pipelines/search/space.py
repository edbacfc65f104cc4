"""What a search may choose of I3D's temporal geometry, and what the paper chose; no Ray.

A choice is a name and a value; a geometry is one value for each name. Flow at input stride s is every s-th frame of the
flow between neighbouring frames, not the flow over s frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from models.inception import POOLS, TemporalExtents
from pipelines.records import Values

Geometry = Mapping[str, int | float | str]

PAPER = TemporalExtents()
POOL_CHOICES = tuple(name.split("_")[1] for name in POOLS)  # 2a, 3a, 4a, 5a
TEST_SPAN = 250  # frames of a test video that are looked at, whatever the stride


@dataclass(frozen=True, kw_only=True)
class Space:
    """The values of each choice. The paper's are among them, or are added: they are always tried first.

    `frames` counts the kept frames of a training clip, `paper_frames` those of the paper's trial. An empty
    `inflation` or `learning_rate` leaves what the run says; `learning_rate` is (lowest, highest), searched by its
    logarithm.
    """

    paper_frames: int
    frames: tuple[int, ...] = ()
    frame_steps: tuple[int, ...] = (1, 2, 4)
    conv1_kernels: tuple[int, ...] = (3, 5, 7)
    conv1_strides: tuple[int, ...] = (1, 2)
    pool_kernels: tuple[int, ...] = (1, 2, 3)
    pool_strides: tuple[int, ...] = (1, 2)
    inflation: tuple[str, ...] = ()
    learning_rate: tuple[float, float] | None = None
    paper_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.learning_rate and not 0 < self.learning_rate[0] < self.learning_rate[1]:
            raise ValueError(f"--search-learning-rate is {self.learning_rate}: give the lowest and the highest")

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
            name: CategoricalDistribution(tuple(sorted({value, *tried[name]})))
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
            chosen["inflation"] = "mean"
        if self.learning_rate:
            low, high = self.learning_rate
            chosen["learning_rate"] = min(max(self.paper_learning_rate or low, low), high)
        return chosen


def identify(geometry: Geometry) -> str:
    """A short name that equal geometries share."""
    return hashlib.sha256(json.dumps(dict(geometry), sort_keys=True).encode()).hexdigest()[:10]


def model_settings(geometry: Geometry) -> Values:
    """The settings of I3DConfig that a geometry means."""
    frames, frame_step = int(geometry["frames"]), int(geometry["frame_step"])
    return {
        "frames": frames,
        "frame_step": frame_step,
        "test_frames": max(frames, TEST_SPAN // frame_step),
        "conv1_kernel": geometry["conv1_kernel"],
        "conv1_stride": geometry["conv1_stride"],
        "pool_kernels": tuple(geometry[f"pool_{pool}_kernel"] for pool in POOL_CHOICES),
        "pool_strides": tuple(geometry[f"pool_{pool}_stride"] for pool in POOL_CHOICES),
    }


def describe_geometry(geometry: Geometry) -> str:
    """A line such as `16 frames, conv1 7/2, pools 1/1 1/1 3/2 2/2` (kernel/stride)."""
    pools = " ".join(f"{geometry[f'pool_{pool}_kernel']}/{geometry[f'pool_{pool}_stride']}" for pool in POOL_CHOICES)
    step = f" every {geometry['frame_step']}" if int(geometry["frame_step"]) > 1 else ""
    rate = f", learning rate {geometry['learning_rate']:.3g}" if "learning_rate" in geometry else ""
    inflation = f", {geometry['inflation']} inflation" if "inflation" in geometry else ""
    conv1 = f"{geometry['conv1_kernel']}/{geometry['conv1_stride']}"
    return f"{geometry['frames']} frames{step}, conv1 {conv1}, pools {pools}{rate}{inflation}"
