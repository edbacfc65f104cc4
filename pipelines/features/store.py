"""How the features of a shard's videos become files, and are read again when a retry keeps them.

OUT/plan.json                              settings and fingerprint, written before any work
OUT/features/train-00000.parquet           of the Parquet layout: a row per window, stream and crop, with its vector
OUT/features/ID.npy, rgb/ID.npy, …         of the others: arrays of a video
OUT/windows/train-00000.parquet            with them: a row per window, which says when it begins and ends
OUT/commits/train-00000.json               what vouches for these files
OUT/videos.parquet, quarantine.parquet     one row per catalog video, and one per video that failed
OUT/features.json                          settings, networks, conventions, counts; the last file
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.datasets import commits
from pipelines.datasets.commits import StoredFile
from pipelines.datasets.shards import Row
from pipelines.errors import RunError
from pipelines.features.layouts import VideoFacts, VideoVectors, list_files, make_files, make_rows, make_schema
from pipelines.features.records import FeatureCommit, describe
from pipelines.features.settings import FeatureSettings
from pipelines.features.task import FeatureTask
from pipelines.features.windows import Windows

ARRAYS = "features"  # folder of the arrays, and of tables that hold the vectors


def table_path(settings: FeatureSettings, name: str) -> str:
    """The table of a shard, relative to the output."""
    return f"{ARRAYS if settings.layout == 'parquet' else 'windows'}/{name}.parquet"


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """What the shard that is there holds of a video that is kept: its rows, and its arrays."""

    tables: Iterator[pa.Table]
    files: tuple[StoredFile, ...]


def describe_vectors(vectors: VideoVectors) -> Row:
    """What a finished row has of its features: the `vectors` themselves, and their numbers."""
    (windows,) = {len(stream) for stream in vectors.values()}
    num_bytes = sum(prod(stream.shape) * stream.dtype.itemsize for stream in vectors.values())
    return {"vectors": vectors, "windows": windows, "feature_bytes": num_bytes}


def commit_features(
    output: str, name: str, rows: Iterable[Row], *, task: FeatureTask, windows: Windows, fingerprint: str
) -> FeatureCommit:
    """Put the files of a shard, then its commit record.

    Of the rows each goes into its files as it comes, block by block. Arrays are put at once: those of a video that was
    kept are left as they are, and what no record vouches for does not exist. The table, which a retry replaces, is put
    between the pending record and the record.
    """
    settings, videos, files = task.settings, list[Row](), list[StoredFile]()
    with storage.draft(storage.join(output, table_path(settings, name))) as draft:
        with pq.ParquetWriter(draft, make_schema(settings)) as writer:
            for row in rows:
                videos.append(describe(row))
                if row["status"] == "ok":
                    stored = row["stored"] or _put_arrays(output, row, settings, windows)
                    files += stored.files
                    # Row groups of one video: so a retry takes videos over one by one.
                    for table in stored.tables:
                        writer.write_table(table, row_group_size=max(1, len(table)))
                else:
                    _remove_arrays(output, task, row["id"])
                del row  # before the next one is made
        usable = any(video["status"] == "ok" for video in videos)
        if usable:
            path = table_path(settings, name)
            files.append(StoredFile(path=path, num_bytes=draft.num_bytes, sha256=draft.sha256))
        commit = FeatureCommit(
            shard=name,
            split=str(videos[0]["split"]),
            files=tuple(sorted(files, key=lambda file: file.path)),
            fingerprint=fingerprint,
            videos=videos,
        )
        # Whoever reads the folder without its records must not meet what an interrupted run left.
        commits.put_commit(output, commit, draft.put if usable else lambda: storage.delete(draft.uri))
    return commit


def _put_arrays(output: str, row: Row, settings: FeatureSettings, windows: Windows) -> StoredFeatures:
    """Put the arrays of a video, and open its rows."""
    facts = VideoFacts(
        id=row["id"],
        num_frames=row["num_frames"],
        fps=row["fps"],
        class_name=row["class_name"],
        split=row["split"],
    )
    files = []
    for array in make_files(settings, windows, facts, row["vectors"]):
        path = f"{ARRAYS}/{array.path}"
        with storage.draft(storage.join(output, path)) as draft:
            array.write(draft)
            draft.put()
        files.append(StoredFile(path=path, num_bytes=draft.num_bytes, sha256=draft.sha256))
    return StoredFeatures(tables=make_rows(settings, windows, facts, row["vectors"]), files=tuple(files))


def _remove_arrays(output: str, task: FeatureTask, video: str) -> None:
    """Of a video that has none now: an interrupted run may have left some, which readers would take for its own."""
    for path in list_files(task.settings, task.streams, video):
        storage.delete(storage.join(output, ARRAYS, path))


def read_kept(output: str, name: str, kept: list[Row], task: FeatureTask) -> Iterator[Row]:
    """The rows that a retry takes over from the shard that is there, in order.

    Raises RunError where that is not the one that was committed.
    """
    if not kept:
        return
    path = table_path(task.settings, name)
    commit = commits.read_commit(output, name, FeatureCommit)
    # Else the new record would vouch for bytes that have changed since they were written.
    if not commits.fits(output, commit):
        raise RunError(
            f"the files of shard {name} of {output} are not as they were committed, so its videos cannot be kept: run "
            "the same command with --verify, which makes damaged shards again, or restore them from a copy"
        )
    files = {file.path: file for file in commit.files}
    held = [video for video in commit.videos if video["status"] == "ok"]
    rows_a_window = task.settings.crops * len(task.streams) if task.settings.layout == "parquet" else 1
    with storage.open_read(storage.join(output, path)) as file:
        parquet = pq.ParquetFile(file)
        groups = _list_groups(parquet, [rows_a_window * video["windows"] for video in held])
        facts = {video["id"]: (video, own) for video, own in zip(held, groups, strict=True)}
        for row in kept:
            video, own = facts[row["id"]]
            arrays = [f"{ARRAYS}/{array}" for array in list_files(task.settings, task.streams, row["id"])]
            tables = (parquet.read_row_group(group).combine_chunks() for group in own)
            yield {
                **row,
                **video,
                "stored": StoredFeatures(tables=tables, files=tuple(files[array] for array in arrays)),
            }


def _list_groups(parquet: pq.ParquetFile, counts: list[int]) -> list[range]:
    """The row groups of videos that have so many rows, in order."""
    group, groups = 0, []
    for count in counts:
        first = group
        while count > 0:
            count -= parquet.metadata.row_group(group).num_rows
            group += 1
        groups.append(range(first, group))
    return groups
