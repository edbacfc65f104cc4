"""What an extraction is to do: which video goes into which shard, under which settings, and what is left of it.

The plan is a function of catalog and settings alone, so every start of the same command makes the same one. plan.json
in the output holds settings and fingerprint; a start that disagrees with it is refused, for shards of two kinds in one
data set could never be told apart.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage, tvl1
from pipelines.datasets import shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.shards import Commit, ShardSettings
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings

# Settings that decide which videos are given up and not what the others become: a retry may raise them.
LIMITS = ("max_frames", "timeout_s", "memory_limit_mb", "cpu_limit_s")
PLAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),  # absolute URI; null if missing
        ("source", pa.string()),  # the same relative to --videos
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("split", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("index", pa.int64()),  # position in the catalog
        ("shard", pa.string()),
        ("status", pa.string()),  # "new", "missing", "kept" (its row is taken from the shard that is there) or "pad"
    ]
)


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """Everything that decides about the bytes of the output."""

    decode: DecodeSettings = field(default_factory=DecodeSettings)
    flow_preset: Literal["faithful", "quality", "fast"] = "faithful"
    codec: CodecSettings = field(default_factory=CodecSettings)
    shards: ShardSettings = field(default_factory=ShardSettings)
    error_sample_every: int = 16  # the flow error is measured on every 16th video of the catalog


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Catalog and settings, resolved."""

    output: str
    settings: ExtractionSettings
    kernel: str  # flow kernel and the kind of processor it was made for
    classes: tuple[str, ...]
    table: pa.Table  # PLAN_SCHEMA; the rows of a shard are contiguous
    record: Mapping[str, Any]  # what plan.json holds
    fingerprint: str

    @functools.cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Name of each shard → its first row in `table` and its number of rows."""
        runs = pc.run_end_encode(self.table["shard"].combine_chunks())
        ends = [0, *runs.run_ends.to_pylist()]
        spans = {name: (ends[i], ends[i + 1] - ends[i]) for i, name in enumerate(runs.values.to_pylist())}
        assert len(spans) == len(runs.values), "a catalog is ordered by split"
        return spans

    def rows(self, shard: str) -> pa.Table:
        """The planned rows of one shard."""
        first, count = self.spans[shard]
        return self.table.slice(first, count)


class PlanError(ValueError):
    """The output holds another plan; the message names the settings that differ."""


def make_plan(catalog: Catalog, settings: ExtractionSettings, *, videos: str, output: str, kernel: str) -> Plan:
    """Lay the catalog out in shards, each of at most `videos_per_shard` videos of one split, in catalog order."""
    table = catalog.table
    folder = storage.absolute(videos)
    paths = table["path"].to_pylist()
    names = _shard_names(table["split"].to_pylist(), settings.shards.videos_per_shard)
    columns = {
        **{name: table[name] for name in catalog.table.column_names},
        "source": [_relative(path, folder) for path in paths],
        "index": range(len(table)),
        "shard": names,
        "status": ["missing" if path is None else "new" for path in paths],
    }
    record = {
        "schema_version": shards.SCHEMA_VERSION,
        "settings": {**_name_settings(settings), "kernel": kernel},
        "derived": _derive(settings),
        "catalog": {"videos": len(table), "classes": list(catalog.classes), "sha256": hash_catalog(table)},
    }
    return Plan(
        output=output,
        settings=settings,
        kernel=kernel,
        classes=catalog.classes,
        table=pa.table({name: columns[name] for name in PLAN_SCHEMA.names}, schema=PLAN_SCHEMA),
        record=record,
        fingerprint=shards.digest(record),
    )


def _name_settings(settings: ExtractionSettings) -> dict[str, Any]:
    named = asdict(settings)
    for limit in LIMITS:
        del named["decode"][limit]
    return named


def _derive(settings: ExtractionSettings) -> dict[str, Any]:
    """What the names and Nones among the settings stand for in this version, and the libraries that make the bytes."""
    return {
        "flow_quality": settings.codec.resolved_flow_quality,
        "rgb_quality": settings.codec.resolved_rgb_quality,
        "tvl1": asdict(tvl1.PRESETS[settings.flow_preset]),
        "libraries": _find_libraries(),
    }


def _find_libraries() -> dict[str, str]:
    """Versions of the libraries that the bytes come from, as they say themselves: OpenCV has many distributions."""
    return {
        "av": av.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pyarrow": pa.__version__,
    }


def _shard_names(splits: Iterable[str], videos_per_shard: int) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for split in splits:
        position = seen.get(split, 0)
        seen[split] = position + 1
        names.append(shards.shard_name(split, position // videos_per_shard))
    return names


def _relative(path: str | None, folder: str) -> str | None:
    if path is None:
        return None
    return path.removeprefix(folder + "/") if path.startswith(folder + "/") else path.rpartition("/")[2]


def hash_catalog(table: pa.Table) -> str:
    """Sha256 of the ids, labels, class names and splits of a catalog's rows, in its order."""
    # Not the paths: whether a file is there, and where the folder lies, may change between two starts.
    sha = hashlib.sha256()
    for row in zip(*(table[name].to_pylist() for name in ("id", "label", "class_name", "split")), strict=True):
        sha.update(f"{row}\n".encode())
    return sha.hexdigest()


def settle(plan: Plan) -> None:
    """Write plan.json, or check that the one that is there is the same; PlanError names every setting that differs.

    The caller holds the output's lock.
    """
    uri = storage.join(plan.output, "plan.json")
    try:
        there = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        storage.put(uri, shards.to_json(plan.record))
        return
    found, wanted = (_describe(record) for record in (there, json.loads(shards.to_json(plan.record))))
    changed = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if changed:
        # What is derived from a setting that changed would only hide it.
        named = [name for name in changed if not name.startswith("derived.")] or changed
        sides = ((name, found.get(name, "nothing"), wanted.get(name, "nothing")) for name in named)
        lines = "\n".join(f"  {name}: {before} there, {now} now" for name, before, now in sides)
        raise PlanError(
            f"{plan.output} was begun with other settings:\n{lines}\n"
            "Run with the settings it was begun with, or choose another --output"
        )


def _describe(value: object, name: str = "") -> dict[str, str]:
    """Every leaf of nested dicts as text under its dotted name; a leaf that is None differs from one that is absent."""
    if not isinstance(value, dict):
        return {name: repr(value)}
    parts = [_describe(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return {key: text for part in parts for key, text in part.items()}


def read_own_commits(plan: Plan) -> Iterator[Commit]:
    """The commit records of the output that were written under this plan."""
    return (commit for commit in shards.read_commits(plan.output) if commit.fingerprint == plan.fingerprint)


def find_committed(plan: Plan) -> dict[str, frozenset[str]]:
    """The shards of this plan that have a commit record, each with the ids of the videos that it holds."""
    return {
        commit.shard: frozenset(str(video["id"]) for video in commit.videos if video["status"] == "ok")
        for commit in read_own_commits(plan)
    }


def iter_blocks(plan: Plan, committed: Mapping[str, frozenset[str]], *, retry: bool) -> Iterator[pa.Table]:
    """One table of exactly `videos_per_shard` rows for each shard that is still to be made, in order.

    With `retry` also those with quarantined videos, or with missing ones whose file is there now; the videos that such
    a shard holds already are kept as they are.
    """
    size = plan.settings.shards.videos_per_shard
    for shard in plan.spans:
        rows = plan.rows(shard)
        if shard in committed:
            if not retry:
                continue
            rows = _keep(rows, committed[shard])
            if "new" not in rows["status"].to_pylist():
                continue
        yield pa.concat_tables([rows, _pad(shard, size - len(rows))]).combine_chunks()


def _keep(rows: pa.Table, held: frozenset[str]) -> pa.Table:
    status = ["kept" if row["id"] in held else row["status"] for row in rows.to_pylist()]
    return rows.set_column(rows.column_names.index("status"), "status", pa.array(status, pa.string()))


def _pad(shard: str, count: int) -> pa.Table:
    return pa.Table.from_pylist([{"shard": shard, "status": "pad"}] * count, schema=PLAN_SCHEMA)
