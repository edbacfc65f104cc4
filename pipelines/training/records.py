"""What a training leaves for its readers: run.json, result.json and the lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipelines import records, storage
from pipelines.errors import RecordError
from pipelines.records import Record

RUN = "run.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """What run.json holds: the settings that decide about a run's weights, and its data."""

    model: Mapping[str, object]  # its settings, and its name
    clips: Mapping[str, object] = field(default_factory=dict)
    augmentation: Mapping[str, object] = field(default_factory=dict)
    optimisation: Mapping[str, object] = field(default_factory=dict)
    reporting: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    initial: str = ""
    data: str
    classes: tuple[str, ...] = ()
    train_videos: int
    validation_videos: int


@dataclass(frozen=True, kw_only=True)
class RunResult(Record):
    """What result.json holds: the last and the best checkpoint, relative to the run, and the last report's metrics."""

    last: str
    best: str
    metrics: Mapping[str, object] = field(default_factory=dict)

    def checkpoint(self, which: Literal["last", "best"]) -> str:
        """The checkpoint of that kind, relative to the run."""
        return self.last if which == "last" else self.best

    def number(self, name: str) -> float | None:
        """A metric of the last report; None where it is none of them, as without a validation."""
        value = self.metrics.get(name)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, kw_only=True)
class TrainingLine(Record):
    """Means over the steps since the line before; `errors` are of clips that could not be decoded, the first few."""

    step: int
    clips: int
    epoch: float
    learning_rate: float
    loss: float
    top1: float
    clips_per_s: float
    wait_share: float
    failed: int = 0
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ValidationLine(Record):
    """One validation; the accuracies are over all of its videos."""

    step: int
    clips: int = 0
    val_loss: float
    val_top1: float
    val_top5: float | None = None
    val_failed: int = 0
    val_videos: int = 0
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MetricsLog:
    """The lines of metrics.jsonl, by kind, in order."""

    train: tuple[TrainingLine, ...] = ()
    validation: tuple[ValidationLine, ...] = ()


def read_metrics(output: str) -> MetricsLog:
    """The metrics of a run so far; none where no line was written yet. Raises RecordError for a damaged file."""
    uri = storage.join(output, METRICS)
    if not storage.exists(uri):
        return MetricsLog()
    kinds: dict[str, list[object]] = {"train": [], "validation": []}
    for number, line in enumerate(storage.read_text(uri).splitlines(), start=1):
        values = records.parse(line, f"line {number} of {uri}")
        kind = values.get("kind") if isinstance(values, dict) else None
        if not isinstance(kind, str):
            raise RecordError(f"line {number} of {uri} is damaged, or was not written by a job: it has no kind")
        kinds.setdefault(kind, []).append(values)
    return MetricsLog(
        train=tuple(TrainingLine.from_json(values, where=uri) for values in kinds["train"]),
        validation=tuple(ValidationLine.from_json(values, where=uri) for values in kinds["validation"]),
    )
