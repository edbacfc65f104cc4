"""What a data set says of itself: dataset.json, and the convention by which its shards are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipelines import records, storage
from pipelines.errors import RecordError
from pipelines.media.codec import Convention
from pipelines.records import Record, Values

SCHEMA_VERSION = 1
DATASET = "dataset.json"  # the last file of a data set: whoever finds it finds all the others


def check_version(values: object, where: str) -> None:
    """Raises RecordError where an object of a data set is of another schema version than this reader's."""
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{where} has schema version {version}, this reader knows {SCHEMA_VERSION}: "
            "use the release that wrote it, or extract again"
        )


@dataclass(frozen=True, kw_only=True)
class ShardConvention(Record):
    """How the blobs of a row were made and are to be read; it travels inside every shard.

    `flow` says what turns stored codes into pixels of motion (`pipelines.media.codec` refuses one that it does not
    know), `tvl1` the flow's preset, parameters and kernel, `rgb` the codec, `sampling` the rate and size of frames as
    `FrameSampling` has them, `members` the extension of each blob in a WebDataset sample.
    """

    schema_version: int = SCHEMA_VERSION
    flow: Convention
    tvl1: Mapping[str, object] = field(default_factory=dict)
    rgb: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, object] = field(default_factory=dict)
    members: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> Values:
        """The record as plain values; a sampling that an earlier version did not say is not said."""
        values = super().to_json()
        if not self.sampling:
            del values["sampling"]
        return values

    @classmethod
    def from_json(cls, values: object, *, where: str) -> ShardConvention:
        """As `Record.from_json`; another schema version, or none, is a RecordError too."""
        check_version(values, where)
        return super().from_json(values, where=where)


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Catalog videos of a split by what became of them, and the RGB frames of the usable ones."""

    expected: int = 0
    ok: int = 0
    missing: int = 0
    quarantined: int = 0
    frames: int = 0


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Frames and bytes of all usable videos."""

    frames: int = 0
    flow_frames: int = 0
    rgb_bytes: int = 0
    flow_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StoredFlowError:
    """Px between decoded and clipped flow over the sampled videos: the mean, the root of the mean square, and the
    largest 99.9th percentile and maximum of a video."""

    videos: int
    mean: float
    rms: float
    p999: float
    max: float


@dataclass(frozen=True, kw_only=True)
class ListedShard:
    """A shard with rows, and how to tell that it is whole; `file` is relative to the data set."""

    file: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FrameSampling(Record):
    """How videos were decoded: `fps` frames a second, or "native" for the rate that each has, at the shorter side in px
    or, where it is given, at `frame_size`, "WIDTHxHEIGHT"."""

    fps: float | Literal["native"]
    short_side: int
    frame_size: str | None = None

    def describe(self) -> str:
        """In words."""
        size = f"{self.frame_size} px" if self.frame_size else f"shorter side {self.short_side} px"
        return f"{self.describe_rate()}, {size}"

    def describe_rate(self) -> str:
        """The rate in words."""
        return describe_rate(self.fps)

    @property
    def shorter_side(self) -> int:
        """The shorter side of the frames in px."""
        return min(map(int, self.frame_size.split("x"))) if self.frame_size else self.short_side


def describe_rate(fps: float | Literal["native"]) -> str:
    """A rate that frames are taken at, in words."""
    return "frames at their videos' own rate" if fps == "native" else f"{fps:g} frames a second"


@dataclass(frozen=True, kw_only=True)
class Dataset(Record):
    """What dataset.json holds; `settings` are those of the extraction, as plan.json has them."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    settings: Mapping[str, object]
    convention: ShardConvention
    classes: tuple[str, ...]
    splits: Mapping[str, SplitCounts]
    totals: Totals = field(default_factory=Totals)
    quarantine_reasons: Mapping[str, int] = field(default_factory=dict)
    flow_error_px: StoredFlowError | None = None
    shards: tuple[ListedShard, ...]

    @property
    def sampling(self) -> FrameSampling:
        """How the videos were decoded. Raises RecordError where the settings do not say it."""
        return FrameSampling.from_json(self.settings.get("decode"), where=f"settings.decode of {DATASET}")

    def to_json(self) -> Values:
        """The record as plain values; without a usable video there are no totals."""
        values = {**super().to_json(), "convention": self.convention.to_json()}
        return values if self.totals.frames else {**values, "totals": {}}

    @classmethod
    def from_json(cls, values: object, *, where: str) -> Dataset:
        """As `Record.from_json`; another schema version, or none, is a RecordError too."""
        check_version(values, where)
        return super().from_json(values, where=where)


def read_dataset(output: str) -> Dataset:
    """`dataset.json` of a finished data set; one clear error where there is none or its version is another one."""
    try:
        return records.read(storage.join(output, DATASET), Dataset)
    except FileNotFoundError as error:
        raise RecordError(
            f"{output} holds no finished data set (no {DATASET}). "
            "If an extraction was interrupted, run its command again: it resumes."
        ) from error
