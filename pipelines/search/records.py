"""What a search says of itself: sweep.json, the trial.json of each trial, and result.json; no Ray."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines import records, storage
from pipelines.errors import RecordError
from pipelines.formatting import format_count
from pipelines.records import Record, Values
from pipelines.search.space import Geometry, describe_geometry, model_settings
from pipelines.training.records import RESULT

SETTINGS = "sweep.json"
TRIAL = "trial.json"
State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED: tuple[State, ...] = ("finished", "stopped")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Record):
    """What sweep.json holds, written before any work: the paper's run, the values of each choice, and the rungs."""

    run: Mapping[str, object]
    choices: Mapping[str, str]
    steps: int
    first_rung: int
    reduction: int
    objective: str

    @property
    def stream(self) -> object:
        """The stream that the networks see."""
        model = self.run.get("model")
        return model.get("stream") if isinstance(model, Mapping) else None


@dataclass(frozen=True, kw_only=True)
class TrialReport:
    """A validation of a trial: steps and clips that training has seen, and seconds of all its starts."""

    step: int
    clips: int
    val_top1: float
    val_loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trial(Record):
    """One geometry, and what came of it."""

    id: str
    number: int
    geometry: Geometry
    gflops: float  # of one test video
    state: State = "waiting"
    seconds: float = 0.0  # of all starts
    curve: tuple[TrialReport, ...] = ()
    reason: str = ""

    @property
    def score(self) -> float | None:
        """Top-1 of the last report."""
        return self.curve[-1].val_top1 if self.curve else None

    @property
    def step(self) -> int:
        return self.curve[-1].step if self.curve else 0

    @property
    def clips(self) -> int:
        """Clips that training has seen."""
        return self.curve[-1].clips if self.curve else 0

    @property
    def rank(self) -> tuple[float, float, float]:
        """Sorts the best first: top-1, then loss, then what it costs."""
        last = self.curve[-1]
        # NaN is neither smaller nor larger: sorted by it, any trial could come first.
        loss = last.val_loss if math.isfinite(last.val_loss) else math.inf
        return -last.val_top1, loss, self.gflops


@dataclass(frozen=True, kw_only=True)
class ScoredTrial(Record):
    """A trial at full length in the table; `seeds`: top-1 of the search's own seed, and of those trained again."""

    id: str
    number: int
    geometry: Geometry
    gflops: float
    seeds: tuple[float, ...]

    @property
    def top1(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.seeds)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of one."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None

    def to_json(self) -> Values:
        """The record as plain values, with what follows from it for other readers."""
        return {**super().to_json(), "settings": model_settings(self.geometry), "top1": self.top1}

    def format(self) -> str:
        """A line of the table."""
        spread = f" ± {self.spread:.1%} of {format_count(len(self.seeds), 'seed')}" if self.spread is not None else ""
        text = describe_geometry(self.geometry)
        return f"top-1 {self.top1:.1%}{spread}, {self.gflops:.2f} GFLOPs a video: {text} (trial {self.number})"


@dataclass(frozen=True, kw_only=True)
class Cost(Record):
    """What a search took. Hours are those that its workers and their decoding had reserved."""

    clips: int
    cpu_hours: float
    gpu_hours: float
    saved_clips: int  # that stopped trials would have seen

    @property
    def saved_share(self) -> float:
        """Of the clips that all trials at full length would have seen."""
        return self.saved_clips / max(1, self.clips + self.saved_clips)

    def to_json(self) -> Values:
        """The record as plain values, with what follows from it for other readers."""
        return {**super().to_json(), "saved_share": self.saved_share}


@dataclass(frozen=True, kw_only=True)
class Outcome(Record):
    """What result.json holds: the best, by the mean over seeds where there are some; the paper's, None where it
    failed; the front of accuracy and cost; the cost; how much each choice decides."""

    best: ScoredTrial
    paper: ScoredTrial | None
    front: tuple[ScoredTrial, ...]
    cost: Cost
    importance: Mapping[str, float]

    def to_json(self) -> Values:
        """The record as plain values."""
        return {
            "best": self.best.to_json(),
            "paper": self.paper.to_json() if self.paper else None,
            "front": [trial.to_json() for trial in self.front],
            "cost": self.cost.to_json(),
            "importance": dict(self.importance),
        }


def read_outcome(output: str) -> Outcome:
    """What result.json of a finished search holds. Raises RecordError where there is none."""
    uri = storage.join(output, RESULT)
    if not storage.exists(uri):
        raise RecordError(f"{output} holds no finished sweep: {uri} is not there. Run jobs/tune.py to its end")
    values = records.parse(storage.read_bytes(uri), uri)
    if not (isinstance(values, dict) and isinstance(values.get("best"), dict)):  # that of a training has a path there
        raise RecordError(f"{uri} is not the result of a sweep: give the --output of jobs/tune.py")
    return Outcome.from_json(values, where=uri)
