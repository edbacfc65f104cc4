"""What an evaluation says: evaluation.json, and what a Fréchet distance does: fvd.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.errors import RecordError
from pipelines.records import Record, Values

EVALUATION = "evaluation.json"
FVD = "fvd.json"


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of videos whose class is the first, or among the first five; None of no videos, or no more classes."""

    top1: float | None
    top5: float | None


@dataclass(frozen=True, kw_only=True)
class NetworkAccuracy:
    """What a network, or the sum of several, gets right: of all videos that there should be, and of those scored."""

    of_expected: Accuracy
    of_evaluated: Accuracy


@dataclass(frozen=True, kw_only=True)
class FusionAccuracy:
    """Top-1 where RGB's logits weigh `rgb_weight`, and flow's the rest of 1."""

    rgb_weight: float
    top1: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """What evaluation.json holds.

    `top1`, `top5`, `top1_interval_95`, `mean_per_class` and `per_class` are of the networks' sum, and of the evaluated
    videos where `ignore_missing`, else of the expected ones. `classes` are in the order of the rows (true) and columns
    (predicted) of `confusion`, which counts evaluated videos.
    """

    expected: int
    evaluated: int
    missing: int
    quarantined: int
    failed: int
    not_finite: int = 0  # of the evaluated: their logits are no numbers, and they count as wrong
    ignore_missing: bool
    top1: float | None
    top5: float | None
    top1_interval_95: tuple[float, float] | None
    mean_per_class: float | None
    figures: Mapping[str, NetworkAccuracy]  # by network, and "fused"
    per_class: Mapping[str, float | None]
    confusion: tuple[tuple[int, ...], ...]
    fusion_sweep: tuple[FusionAccuracy, ...] = ()
    classes: tuple[str, ...]
    settings: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> Values:
        """The record as plain values; scores that are not finite are counted where there are some."""
        values = super().to_json()
        if not self.not_finite:
            del values["not_finite"]
        return values

    @property
    def data(self) -> str:
        """The shards that were evaluated. Raises RecordError where the settings do not say it."""
        if "data" not in self.settings:
            raise RecordError(f"{EVALUATION} lacks settings.data: evaluate again")
        return str(self.settings["data"])


@dataclass(frozen=True, kw_only=True)
class SetCounts:
    """One side of a distance: its videos that were to be read, the clips that they gave, and why others gave none.

    Of statistics that were read from a file `videos` is None.
    """

    name: str
    videos: int | None
    clips: int
    failed: Mapping[str, str] = field(default_factory=dict)  # by video


@dataclass(frozen=True, kw_only=True)
class VideoDistance(Record):
    """What fvd.json holds; `embedding` is what the vectors are, `settings` how the clips were chosen."""

    fvd: float
    dimensions: int
    embedding: Mapping[str, object]
    settings: Mapping[str, object] = field(default_factory=dict)
    real: SetCounts
    generated: SetCounts
