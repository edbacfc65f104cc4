"""A finished output of features from its commit records: the tables of videos and quarantine, and features.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines import records, storage
from pipelines.datasets import commits, shards
from pipelines.extraction.manifest import check_finished
from pipelines.extraction.work import read_own_commits, tidy
from pipelines.features.plan import FeaturePlan
from pipelines.features.records import SCHEMA_VERSION, VIDEO_SCHEMA, FeatureCommit, FeatureSet
from pipelines.features.sidecar import SIDECAR
from pipelines.records import Values


class _Tally:
    """Adds up commit records as they pass by."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.made: list[str] = []
        self.usable: list[str] = []
        self.splits: dict[str, Counter[str]] = {}
        self.reasons: Counter[str] = Counter()
        self.bytes = 0

    def watch(self, found: Iterable[FeatureCommit]) -> Iterator[FeatureCommit]:
        for commit in found:
            if commits.has_sizes(commit, self.sizes):
                self.made.append(commit.shard)
            if commit.files:
                self.usable.append(commit.shard)
            self.bytes += sum(file.num_bytes for file in commit.files)
            for row in commit.videos:
                names = ("expected", "ok", "missing", "quarantined", "frames", "windows")
                split = self.splits.setdefault(row["split"], Counter(dict.fromkeys(names, 0)))
                split["expected"] += 1
                split[row["status"]] += 1
                if row["status"] == "ok":
                    split["frames"] += row["num_frames"]
                    split["windows"] += row["windows"]
                elif row["status"] == "quarantined":
                    self.reasons[row["error_kind"]] += 1
            yield commit


def assemble(plan: FeaturePlan, described: Values) -> FeatureSet:
    """Write videos.parquet and quarantine.parquet, and return what features.json is to hold.

    described: how the features were made, by `pipelines.features.sidecar`. Raises UnfinishedError where a planned shard
    was not committed, or is not there as it was committed.
    """
    tidy(plan)
    tally = _Tally(plan.list_files())
    found = read_own_commits(plan, FeatureCommit)
    for _ in tally.watch(shards.write_tables(plan.output, found, VIDEO_SCHEMA)):
        pass
    check_finished(plan.output, plan.spans.keys() - set(tally.made))
    values: dict[str, Any] = {
        **described,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": plan.fingerprint,
        "splits": {name: dict(counts) for name, counts in tally.splits.items()},
        "quarantine_reasons": dict(tally.reasons),
        "shards": tally.usable,
        "bytes": tally.bytes,
    }
    return FeatureSet.from_json(values, where=SIDECAR)


def finish(plan: FeaturePlan, found: FeatureSet) -> None:
    """Write features.json, the last file of an output: whoever finds it finds all the others."""
    records.write(storage.join(plan.output, SIDECAR), found)
