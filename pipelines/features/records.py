"""What an output of features says of itself: commit records of its shards, and features.json, its last file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from pipelines import records, storage
from pipelines.datasets.commits import CommitRecord, StoredFile
from pipelines.datasets.records import check_version
from pipelines.datasets.shards import Row
from pipelines.errors import RecordError
from pipelines.features.sidecar import SIDECAR
from pipelines.records import Record

SCHEMA_VERSION = 1

# One row per catalog video, in videos.parquet and in the commit records.
VIDEO_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),  # path of the video file, relative to --videos
        ("source_sha256", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("fps", pa.float64()),
        ("source_fps", pa.float64()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("timing", pa.string()),
        ("partial", pa.bool_()),
        ("windows", pa.int32()),
        ("feature_bytes", pa.int64()),  # of its vectors
        ("status", pa.string()),  # "ok", "missing" or "quarantined"
        ("shard", pa.string()),
        ("stage", pa.string()),  # where it failed: "decode" (fetching included) or "features"
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class FeatureCommit(CommitRecord):
    """What vouches for a shard of features: its table and the arrays of its videos."""

    files: tuple[StoredFile, ...]

    @property
    def stored(self) -> tuple[StoredFile, ...]:
        """All files of the shard; none where no video of it could be used."""
        return self.files


@dataclass(frozen=True, kw_only=True)
class FeatureCounts:
    """Catalog videos of a split by what became of them, with frames and windows of the usable ones."""

    expected: int = 0
    ok: int = 0
    missing: int = 0
    quarantined: int = 0
    frames: int = 0
    windows: int = 0


@dataclass(frozen=True, kw_only=True)
class FeatureSet(Record):
    """What features.json holds: how the features were made (`sidecar.describe_features`), and what became of videos.

    `shards` are the names of the commit records with usable videos, `bytes` those of all files of features.
    """

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    preset: Mapping[str, object] | None
    settings: Mapping[str, object]
    windows: Mapping[str, object]
    networks: Mapping[str, Mapping[str, object]]
    precision: str
    decoding: Mapping[str, object]
    flow: Mapping[str, object] | None
    splits: Mapping[str, FeatureCounts]
    quarantine_reasons: Mapping[str, int]
    shards: tuple[str, ...]
    bytes: int

    @classmethod
    def from_json(cls, values: object, *, where: str) -> FeatureSet:
        """As `Record.from_json`; another schema version, or none, is a RecordError too."""
        check_version(values, where)
        return super().from_json(values, where=where)


def read_features(output: str) -> FeatureSet:
    """`features.json` of a finished output; one clear error where there is none or its version is another one."""
    try:
        return records.read(storage.join(output, SIDECAR), FeatureSet)
    except FileNotFoundError as error:
        raise RecordError(
            f"{output} holds no finished features (no {SIDECAR}). If their job was interrupted, run its command again: "
            "it goes on"
        ) from error


def describe(row: Row) -> Row:
    """What videos.parquet keeps of a finished row."""
    return {name: row.get(name) for name in VIDEO_SCHEMA.names}
