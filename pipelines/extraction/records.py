"""What an extraction says of itself: plan.json, and runs/TIME.json of each start of its command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipelines.records import Record, Values

PLAN = "plan.json"
RUNS = "runs"  # folder of an output


@dataclass(frozen=True, kw_only=True)
class PlannedCatalog:
    """The catalog that a plan was made of; `sha256` is of its ids, labels, class names and splits."""

    videos: int
    classes: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PlanRecord(Record):
    """What plan.json holds, written before any work; its hash is the fingerprint of every shard.

    `derived` is what the names and Nones among the settings stand for, and the libraries that make the bytes.
    """

    schema_version: int
    settings: Mapping[str, object]
    derived: Mapping[str, object]
    catalog: PlannedCatalog


class TimelinePoint(NamedTuple):
    """Videos and frames finished, and videos quarantined, so many seconds after the start."""

    seconds: int | float
    videos: int
    frames: int
    quarantined: int


@dataclass(frozen=True, kw_only=True)
class ExtractionRun(Record):
    """One start of the extraction command: when, where and how fast, which the shards never say."""

    started: str
    seconds: int | float
    host: str
    placement: Mapping[str, object] = field(default_factory=dict)
    videos_by_node: Mapping[str, int] = field(default_factory=dict)
    gpu_share: float | None = None  # of the time that GPUs computed flow; None: without GPUs
    versions: Mapping[str, str] = field(default_factory=dict)
    timeline: tuple[TimelinePoint, ...] = ()

    def to_json(self) -> Values:
        """The record as plain values, without a share of GPUs where there were none."""
        values = super().to_json()
        if self.gpu_share is None:
            del values["gpu_share"]
        return values

    @property
    def frames(self) -> int:
        """RGB frames of the videos that were finished."""
        return self.timeline[-1].frames if self.timeline else 0

    @property
    def videos(self) -> int:
        """Videos finished, quarantined ones included."""
        return self.timeline[-1].videos if self.timeline else 0
