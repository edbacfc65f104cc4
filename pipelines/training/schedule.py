"""The learning rate over a run.

A schedule counts steps of `reference_batch` clips. With other workers or batches the same number of clips is seen: at a
global batch of b clips a run takes reference_batch / b times as many steps, at b / reference_batch times the learning
rate (the linear scaling rule; Goyal et al. 2017). Momentum and weight decay stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro import conf

from pipelines.errors import SettingsError

LEARNING_RATE = 0.05  # of --steps
DROPS = (0.6, 0.85)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases of constant learning rate: (steps, rate) one after the other; the first steps rise linearly to it."""

    phases: tuple[tuple[int, float], ...]
    reference_batch: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not self.phases or any(steps < 1 or not 0 < rate < math.inf for steps, rate in self.phases):
            raise SettingsError(
                f"the schedule's phases are {self.phases}: they are pairs of steps (at least 1) and learning rate "
                "(above 0)"
            )
        if self.reference_batch < 1:
            raise SettingsError(f"the reference batch is {self.reference_batch}: it must be at least 1 clip")
        if not 0 <= self.warmup_steps <= self.reference_steps:
            raise SettingsError(
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
class ScheduleSettings:
    """How long to train, and the learning rate on the way; `phases` and `reference_batch` are those of a preset."""

    steps: int | None = None
    """Training steps, counted with the given workers and batch. None: the preset's."""
    learning_rate: float | None = None
    """Initial learning rate; later phases keep their ratio to it. None: the preset's, or 0.05 with --steps."""
    drops: tuple[float, ...] | None = None
    """Fractions of --steps at which the learning rate drops to a tenth. None: 0.6 0.85."""
    warmup_steps: int = 0
    """Steps during which the learning rate rises linearly from zero. A preset may set it."""
    phases: Annotated[tuple[tuple[int, float], ...], conf.Suppress, conf.Fixed] = ()
    reference_batch: Annotated[int, conf.Suppress] = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise SettingsError(f"--steps is {self.steps}: give at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise SettingsError(f"--learning-rate is {self.learning_rate}: give a rate above 0")
        if self.drops is not None and self.steps is None:
            raise SettingsError("--drops divides --steps, which is not given; a preset has phases of its own")

    def resolve(self, global_batch: int) -> Schedule:
        """The schedule at `global_batch` clips a step: that of --steps counts these, a preset's its own batch."""
        if self.steps is not None:
            rate = LEARNING_RATE if self.learning_rate is None else self.learning_rate
            phases = drop_at(self.steps, rate, DROPS if self.drops is None else self.drops)
            return Schedule(phases=phases, reference_batch=global_batch, warmup_steps=self.warmup_steps)
        if not self.phases:
            raise SettingsError("neither --preset nor --steps says how long to train")
        first = self.phases[0][1]
        factor = 1.0 if self.learning_rate is None else self.learning_rate / first
        phases = tuple((steps, rate * factor) for steps, rate in self.phases)
        return Schedule(phases=phases, reference_batch=self.reference_batch, warmup_steps=self.warmup_steps)


def drop_at(steps: int, rate: float, shares: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Phases of `steps` in all whose rate falls to a tenth at each of the shares (0 to 1, ascending)."""
    borders = [0.0, *shares, 1.0]
    if sorted(set(borders)) != borders:
        raise SettingsError(f"--drops is {' '.join(map(str, shares))}: give ascending shares between 0 and 1")
    lengths = [round(steps * end) - round(steps * start) for start, end in itertools.pairwise(borders)]
    # Of a few steps a phase may be left none.
    return tuple((length, rate * 0.1**index) for index, length in enumerate(lengths) if length)
