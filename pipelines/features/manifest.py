"""A finished output of features from its commit records: the tables of videos and quarantine, and features.json."""

from __future__ import annotations

from typing import Any, ClassVar

from pipelines import records, storage
from pipelines.datasets import commits, shards
from pipelines.extraction.manifest import CommitCounts, check_finished
from pipelines.extraction.work import read_own_commits, tidy
from pipelines.features.plan import FeaturePlan
from pipelines.features.records import SCHEMA_VERSION, VIDEO_SCHEMA, FeatureCommit, FeatureSet
from pipelines.features.sidecar import SIDECAR
from pipelines.records import Values


class _Counts(CommitCounts[FeatureCommit]):
    COLUMNS: ClassVar = {**CommitCounts.COLUMNS, "windows": "windows"}

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.made: list[str] = []
        self.usable: list[str] = []
        self.bytes = 0

    def add(self, commit: FeatureCommit) -> None:
        if commits.has_sizes(commit, self.sizes):
            self.made.append(commit.shard)
        if commit.files:
            self.usable.append(commit.shard)
        self.bytes += sum(file.num_bytes for file in commit.files)


def assemble(plan: FeaturePlan, described: Values) -> FeatureSet:
    """Write videos.parquet and quarantine.parquet, and return what features.json is to hold.

    described: how the features were made, by `pipelines.features.sidecar`. Raises UnfinishedError where a planned shard
    was not committed, or is not there as it was committed.
    """
    tidy(plan)
    counts = _Counts(plan.list_files())
    found = read_own_commits(plan, FeatureCommit)
    for _ in counts.watch(shards.write_tables(plan.output, found, VIDEO_SCHEMA)):
        pass
    check_finished(plan.output, plan.spans.keys() - set(counts.made))
    values: dict[str, Any] = {
        **described,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": plan.fingerprint,
        "splits": {name: dict(split) for name, split in counts.splits.items()},
        "quarantine_reasons": dict(counts.reasons),
        "shards": counts.usable,
        "bytes": counts.bytes,
    }
    return FeatureSet.from_json(values, where=SIDECAR)


def finish(plan: FeaturePlan, found: FeatureSet) -> None:
    """Write features.json, the last file of an output: whoever finds it finds all the others."""
    records.write(storage.join(plan.output, SIDECAR), found)
