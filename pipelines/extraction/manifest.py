"""A finished data set from its commit records: the tables of videos and quarantine, and dataset.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import ClassVar, Generic, TypeVar

from pipelines import records, storage
from pipelines.datasets import shards
from pipelines.datasets.commits import CommitRecord
from pipelines.datasets.records import DATASET, Dataset, ListedShard, SplitCounts, StoredFlowError, Totals
from pipelines.datasets.shards import Commit, Row
from pipelines.errors import RunError
from pipelines.extraction.plan import Plan, make_convention
from pipelines.extraction.work import read_own_commits, tidy
from pipelines.formatting import format_count

C = TypeVar("C", bound=CommitRecord)

ERROR_COLUMNS = ("flow_error_mean", "flow_error_rms", "flow_error_p999", "flow_error_max")


class UnfinishedError(RunError):
    """Some planned shards have no commit record, or are not there as it says."""


def check_finished(output: str, unfinished: Collection[str]) -> None:
    """Raises UnfinishedError where some shards are unfinished."""
    if unfinished:
        raise UnfinishedError(
            f"{output} lacks {format_count(len(unfinished), 'shard')}, not made or not there as made, such as "
            f"{min(unfinished)}: the same command makes them"
        )


class CommitCounts(Generic[C]):
    """What commit records add up to, as they pass by: videos by split and status, and reasons of quarantine."""

    # What the usable videos of a split add up to, and the column of a row that says it.
    COLUMNS: ClassVar[Mapping[str, str]] = {"frames": "num_frames"}

    def __init__(self) -> None:
        self.splits: dict[str, Counter[str]] = {}
        self.reasons: Counter[str] = Counter()

    def watch(self, commits: Iterable[C]) -> Iterator[C]:
        """The same records."""
        for commit in commits:
            self.add(commit)
            for row in commit.videos:
                self.add_video(row)
            yield commit

    def add(self, commit: C) -> None:
        """Count what is a shard's and not a video's."""
        raise NotImplementedError

    def add_video(self, row: Row) -> None:
        """Count a row of a record."""
        names = ("expected", "ok", "missing", "quarantined", *self.COLUMNS)
        split = self.splits.setdefault(row["split"], Counter(dict.fromkeys(names, 0)))
        split["expected"] += 1
        split[row["status"]] += 1
        if row["status"] == "quarantined":
            self.reasons[row["error_kind"]] += 1
        if row["status"] == "ok":
            for name, column in self.COLUMNS.items():
                split[name] += row[column]


class _Counts(CommitCounts[Commit]):
    def __init__(self) -> None:
        super().__init__()
        self.shards: list[ListedShard] = []
        self.totals: Counter[str] = Counter()
        self.errors: list[tuple[float, ...]] = []

    def add(self, commit: Commit) -> None:
        if commit.file is not None:
            self.shards.append(_list_shard(commit))

    def add_video(self, row: Row) -> None:
        super().add_video(row)
        if row["status"] == "ok":
            self.totals["frames"] += row["num_frames"]
            self.totals["flow_frames"] += row["num_frames"] - 1
            self.totals["rgb_bytes"] += row["rgb_bytes"]
            self.totals["flow_bytes"] += row["flow_bytes"]
            if row["flow_error_mean"] is not None:
                self.errors.append(tuple(row[name] for name in ERROR_COLUMNS))

    def flow_error(self) -> StoredFlowError | None:
        """The error of the sampled videos together; None where there is none."""
        if not self.errors:
            return None
        mean, rms, p999, largest = zip(*self.errors, strict=True)
        return StoredFlowError(
            videos=len(self.errors),
            mean=sum(mean) / len(mean),
            rms=(sum(value * value for value in rms) / len(rms)) ** 0.5,
            # A percentile of all cannot be had from those of each; the worst one bounds it.
            p999=max(p999),
            max=max(largest),
        )


def _list_shard(commit: Commit) -> ListedShard:
    assert commit.file is not None
    assert commit.sha256 is not None
    return ListedShard(
        file=commit.file, split=commit.split, rows=commit.num_rows, bytes=commit.num_bytes, sha256=commit.sha256
    )


def assemble(plan: Plan) -> Dataset:
    """Write videos.parquet and quarantine.parquet, and return what dataset.json is to hold.

    Raises UnfinishedError where a planned shard was not committed, or is not there as it was committed.
    """
    tidy(plan)
    sizes = shards.list_shards(plan.output)
    counts = _Counts()
    # In one pass: the rows of a large catalog are never held all at once.
    committed = {
        commit.shard for commit in counts.watch(shards.write_tables(plan.output, read_own_commits(plan, Commit)))
    }
    # A graph that ended without an error is not taken for one that made every shard; others may write here, too.
    lost = {shard.file for shard in counts.shards if sizes.get(shard.file) != shard.bytes}
    check_finished(plan.output, {*(plan.spans.keys() - committed), *lost})
    return Dataset(
        fingerprint=plan.fingerprint,
        settings=plan.record.settings,
        convention=make_convention(plan.settings, plan.kernel),
        classes=plan.classes,
        splits={name: SplitCounts(**split) for name, split in counts.splits.items()},
        totals=Totals(**counts.totals),
        quarantine_reasons=dict(counts.reasons),
        flow_error_px=counts.flow_error(),
        shards=tuple(counts.shards),
    )


def finish(plan: Plan, dataset: Dataset) -> None:
    """Write dataset.json, the last file of a data set: whoever finds it finds all the others."""
    records.write(storage.join(plan.output, DATASET), dataset)
