"""The learning rate over a run, and the released checkpoints' and the paper's schedules as presets.

A schedule counts steps of `reference_batch` clips. With other workers or batches the same number of clips is seen: at a
global batch of b clips a run takes reference_batch / b times as many steps, at b / reference_batch times the learning
rate (the linear scaling rule; Goyal et al. 2017). Momentum and weight decay stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases of constant learning rate: (steps, rate) one after the other; the first steps rise linearly to it."""

    phases: tuple[tuple[int, float], ...]
    reference_batch: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not self.phases or any(steps < 1 or rate <= 0 for steps, rate in self.phases):
            raise ValueError(f"--phases {self.phases}: give pairs of steps (at least 1) and learning rate (above 0)")
        if self.reference_batch < 1:
            raise ValueError(f"the reference batch is {self.reference_batch}: it must be at least 1 clip")
        if not 0 <= self.warmup_steps <= self.reference_steps:
            raise ValueError(
                f"--warmup-steps is {self.warmup_steps}: give 0 to {self.reference_steps}, the run's steps"
            )

    @property
    def reference_steps(self) -> int:
        return sum(steps for steps, _ in self.phases)

    @property
    def clips(self) -> int:
        """Clips seen by a run."""
        return self.reference_steps * self.reference_batch

    def steps(self, batch: int) -> int:
        """Steps of a run at a global batch of `batch` clips."""
        return math.ceil(self.clips / batch)

    def learning_rate(self, clips_seen: int, batch: int) -> float:
        """The rate of the step that follows after `clips_seen` clips, at a global batch of `batch` clips."""
        step = clips_seen / self.reference_batch
        rate = self._rate(step) * batch / self.reference_batch
        if step < self.warmup_steps:
            # The middle of this step: the first one is not lost to a rate of zero. A large step may reach beyond the
            # warm-up's end, where the rise has ended too.
            rate *= min(1.0, (step + batch / self.reference_batch / 2) / self.warmup_steps)
        return rate

    def _rate(self, step: float) -> float:
        end = 0
        for steps, rate in self.phases:
            end += steps
            if step < end:
                return rate
        return self.phases[-1][1]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe: the phases go with the reference batch, `model` are settings of the networks that have them."""

    phases: tuple[tuple[int, float], ...]
    reference_batch: int
    source: str
    batch: int = 6  # clips of each worker
    weight_decay: float = 1e-7
    warmup_steps: int = 0
    model: Mapping[str, object] = field(default_factory=lambda: {"dropout": 0.5})


TRANSFER = Preset(
    phases=((3_500, 0.05), (1_000, 0.005), (500, 0.0005)),
    reference_batch=96,
    source="paper, section 3: 16 GPUs of 6 clips, up to 5k steps; rate and drops are ours",
)
# 64 replicas of 6 clips; the flow checkpoint was trained on with a second rise of the rate.
PRESETS: dict[str, Preset] = {
    "kinetics400_rgb": Preset(
        phases=((97_000, 0.1), (11_000, 0.01), (7_000, 0.001)),
        reference_batch=384,
        source="the released RGB checkpoint's README: 115k steps of 384 clips",
    ),
    "kinetics400_flow": Preset(
        phases=((97_000, 0.1), (7_500, 0.01), (10_500, 0.001), (25_000, 0.1), (10_000, 0.01), (5_000, 0.001)),
        reference_batch=384,
        source="the released flow checkpoint's README: 155k steps of 384 clips",
    ),
    "mini_kinetics": Preset(
        phases=((30_000, 0.1), (3_500, 0.01), (1_500, 0.001)),
        reference_batch=384,
        source="paper, version 1: up to 35k steps on miniKinetics; the drops are ours, it says by hand at saturation",
    ),
    "ucf101": TRANSFER,
    "hmdb51": TRANSFER,
    "small": Preset(
        phases=((960, 0.02), (400, 0.002), (240, 0.0002)),
        reference_batch=8,
        source="ours, for a few dozen videos on a CPU (benchmarks/ut_interaction.py)",
        batch=4,
        warmup_steps=50,
        model={"width": 0.25, "size": 64, "frames": 32, "bn_momentum": 0.05, "dropout": 0.5},
    ),
    "debug": Preset(
        phases=((20, 0.05),),
        reference_batch=8,
        source="a few seconds on a CPU, to see that everything runs",
        batch=4,
        model={"width": 0.125, "size": 32, "frames": 16, "bn_momentum": 0.1},
    ),
}


def drop_at(steps: int, rate: float, shares: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Phases of `steps` in all whose rate falls to a tenth at each of the shares (0 to 1, ascending)."""
    borders = [0.0, *shares, 1.0]
    if sorted(set(borders)) != borders:
        raise ValueError(f"--drops is {' '.join(map(str, shares))}: give ascending shares between 0 and 1")
    lengths = [round(steps * end) - round(steps * start) for start, end in itertools.pairwise(borders)]
    # Of a few steps a phase may be left none.
    return tuple((length, rate * 0.1**index) for index, length in enumerate(lengths) if length)
