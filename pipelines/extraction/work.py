"""Planned work: the rows of a catalog in shards, what of them an output holds, and what is left to do.

Shards of frames and flow and shards of features are planned alike. The plan is a function of catalog and settings
alone, so every start of the same command makes the same one. plan.json in the output holds settings and fingerprint; a
start that disagrees with it is refused, for shards of two kinds in one output could never be told apart.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import records, storage
from pipelines.datasets import commits, shards
from pipelines.datasets.commits import CommitRecord
from pipelines.errors import RunError
from pipelines.extraction.records import PLAN, RUNS, PlanRecord
from pipelines.formatting import format_count
from pipelines.resume import was_begun
from pipelines.tvl1 import BACKENDS

C = TypeVar("C", bound=CommitRecord)

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
class PlannedWork:
    """Rows in shards, and where these go. `commit_kind` vouches for a shard, `folders` hold what is put."""

    commit_kind: ClassVar[type[CommitRecord]]
    folders: ClassVar[tuple[str, ...]]

    output: str
    kernel: str  # flow kernel and the kind of processor it was made for
    table: pa.Table  # PLAN_SCHEMA, and more columns after it; the rows of a shard are contiguous
    record: PlanRecord
    fingerprint: str
    task_bytes: int  # of memory for a task to reserve

    @property
    def videos_per_shard(self) -> int:
        """Videos in a shard, at most."""
        raise NotImplementedError

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

    def list_files(self) -> dict[str, int]:
        """The files of shards that are in the output, relative to it, and their sizes in bytes."""
        raise NotImplementedError


def lay_out(table: pa.Table, *, videos: str, videos_per_shard: int) -> pa.Table:
    """The rows of a catalog as PLAN_SCHEMA, in shards of at most so many videos of one split, in their order."""
    folder = storage.absolute(videos)
    paths = table["path"].to_pylist()
    columns = {
        **{name: table[name] for name in table.column_names},
        "source": [_relative(path, folder) for path in paths],
        "index": range(len(table)),
        "shard": name_shards(table["split"].to_pylist(), videos_per_shard),
        "status": ["missing" if path is None else "new" for path in paths],
    }
    return pa.table({name: columns[name] for name in PLAN_SCHEMA.names}, schema=PLAN_SCHEMA)


def name_shards(splits: Iterable[str], videos_per_shard: int) -> list[str]:
    """The shard of each row, by its split and by how many rows of that split are before it."""
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


def begin_output(plan: PlannedWork) -> None:
    """Write plan.json, or find the same one there; the caller holds the output's lock.

    Raises SettingsChangedError, which names every setting that differs.
    """
    uri = storage.join(plan.output, PLAN)
    if not was_begun(uri, plan.record.to_json()):
        records.write(uri, plan.record)


def planned_kernel(output: str) -> str | None:
    """The flow kernel that an output was begun with; None where none was begun, or by another version.

    A plan of another version is refused by `begin_output`, which names what differs.
    """
    uri = storage.join(output, PLAN)
    try:
        values = records.parse(storage.read_bytes(uri), uri)
    except FileNotFoundError:
        return None
    settings = values.get("settings") if isinstance(values, dict) else None
    kernel = settings.get("kernel") if isinstance(settings, dict) else None
    return str(kernel) if backend_of(str(kernel)) in BACKENDS else None


def backend_of(kernel: str) -> str:
    """The backend of `pipelines.tvl1` that a kernel's name begins with."""
    return kernel.partition(" ")[0]


def read_own_commits(plan: PlannedWork, kind: type[C]) -> Iterator[C]:
    """The commit records of the output that were written under this plan."""
    return (commit for commit in commits.read_commits(plan.output, kind) if commit.fingerprint == plan.fingerprint)


def find_committed(plan: PlannedWork, *, verify: bool = False) -> dict[str, frozenset[str]]:
    """The shards of this plan that are there as their commit records say, each with the ids of the videos it holds.

    A shard that was lost, or cut off, since it was committed is none of them, so that it is made again. With `verify`
    neither is one of other bytes, for which every shard is read. Raises RunError where one cannot be made again.
    """
    sizes = plan.list_files()
    committed = {}
    for commit in read_own_commits(plan, plan.commit_kind):
        held = _list_held(commit)
        if commits.has_sizes(commit, sizes) and (not verify or commits.fits(plan.output, commit)):
            committed[commit.shard] = held
        else:
            _check_sources(plan, commit)
    return committed


def tidy(plan: PlannedWork) -> None:
    """Remove what workers that died left, and let the record of each shard fit its files; see `commits.settle`.

    At the start of a run, and at its end: a node that is lost meanwhile leaves things, too. The caller holds the lock.
    Raises RunError where a shard that is damaged cannot be made again.
    """
    inner = (*plan.folders, commits.FOLDER, RUNS)
    storage.remove_leftovers(plan.output, *(storage.join(plan.output, folder) for folder in inner))
    commits.settle(plan.output, plan.commit_kind, check=lambda commit: _check_sources(plan, commit))


def _list_held(commit: CommitRecord) -> frozenset[str]:
    return frozenset(str(video["id"]) for video in commit.videos if video["status"] == "ok")


def _check_sources(plan: PlannedWork, commit: CommitRecord) -> None:
    """Raises RunError where a damaged shard holds videos whose files are gone: made again it would lose them all."""
    shard, held = commit.shard, _list_held(commit)
    rows = plan.rows(shard).select(["id", "status"]).to_pylist()
    if gone := [row["id"] for row in rows if row["status"] == "missing" and row["id"] in held]:
        record = commits.commit_uri(plan.output, shard)
        raise RunError(
            f"shard {shard} of {plan.output} is not there as it was committed, and cannot be made again: the files of "
            f"{format_count(len(gone), 'video')} in it are gone, such as that of {gone[0]}. Put them back, or restore "
            f"the shard from a copy; to give these videos up, delete {record}"
        )


def iter_blocks(plan: PlannedWork, committed: Mapping[str, frozenset[str]], *, retry: bool) -> Iterator[pa.Table]:
    """One table of exactly `videos_per_shard` rows for each shard that is still to be made, in order.

    With `retry` also those with quarantined videos, or with missing ones whose file is there now; the videos that such
    a shard holds already are kept as they are.
    """
    for shard in plan.spans:
        rows = plan.rows(shard)
        if shard in committed:
            if not retry:
                continue
            rows = _keep(rows, committed[shard])
            if "new" not in rows["status"].to_pylist():
                continue
        # One chunk: Ray makes a block of each.
        yield pa.concat_tables([rows, _pad(rows, plan.videos_per_shard - len(rows))]).combine_chunks()


def _keep(rows: pa.Table, in_shard: frozenset[str]) -> pa.Table:
    status = ["kept" if row["id"] in in_shard else row["status"] for row in rows.to_pylist()]
    return rows.set_column(rows.column_names.index("status"), "status", pa.array(status, pa.string()))


def _pad(rows: pa.Table, count: int) -> pa.Table:
    shard = rows["shard"][0].as_py()
    return pa.Table.from_pylist([{"shard": shard, "status": "pad"}] * count, schema=rows.schema)


def find_work(plan: PlannedWork, *, retry: bool = False, verify: bool = False) -> list[pa.Table]:
    """What an output still lacks of a plan: the blocks of `iter_blocks`; begins an output that was not begun.

    retry: also shards with videos in quarantine; verify: also those whose bytes are not those that were committed.
    The caller holds the output's lock. Raises SettingsChangedError where the output holds another plan.
    """
    # First: it refuses other settings, before anything there is touched.
    begin_output(plan)
    tidy(plan)
    return list(iter_blocks(plan, find_committed(plan, verify=verify), retry=retry))
