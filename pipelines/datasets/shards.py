"""The shard format: what a row holds, how a shard is written, committed and read again.

A shard is one Parquet file or one WebDataset tar with the rows of up to `videos_per_shard` videos of one split. It is
written by one atomic put and then vouched for by a commit record (rows, bytes, sha256, fingerprint and the fate of
every catalog video the shard was planned for). A shard without a record does not exist; `dataset.json`, written last,
lists them all. Nothing here depends on the clock or the machine, so equal rows give equal bytes.

    OUT/plan.json              settings and fingerprint, written before any work
    OUT/shards/train-00000.parquet (or .tar)
    OUT/commits/train-00000.json
    OUT/videos.parquet         one row per catalog video, whatever became of it
    OUT/quarantine.parquet     one row per video that failed, with stage, kind and reason
    OUT/dataset.json           settings, fingerprint, classes, splits, shards
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import records, storage
from pipelines.datasets import commits
from pipelines.datasets.commits import CommitRecord, StoredFile
from pipelines.datasets.records import ShardConvention
from pipelines.errors import DataError, SettingsError
from pipelines.formatting import format_count
from pipelines.records import Values

ShardFormat = Literal["parquet", "webdataset"]
Row = dict[str, Any]
Sink = IO[bytes] | storage.Draft
T = TypeVar("T")
C = TypeVar("C", bound=CommitRecord)

COMMITS_PER_ROW_GROUP = 512  # of videos.parquet: bounds what is held while it is written

# What is known of a video that became a row of a shard. The two blobs come last.
ROW_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int32()),  # index into the classes of dataset.json; -1: unlabelled
        ("class_name", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),  # path of the video file, relative to --videos
        ("source_sha256", pa.string()),
        ("start", pa.float64()),  # seconds into the file where the rows' frames begin; null: the whole file
        ("end", pa.float64()),
        ("fps", pa.float64()),
        ("source_fps", pa.float64()),  # pictures a second in the file; below fps frames repeat, with zero flow
        ("num_frames", pa.int32()),  # RGB frames; there is one flow frame fewer
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("timing", pa.string()),  # "time" or "order": how the frames were sampled
        ("partial", pa.bool_()),  # some frames of the file could not be decoded
        ("flow_mean", pa.float64()),  # mean |flow|, px
        ("flow_clipped", pa.float64()),  # share of flow values beyond the bound
        ("flow_error_mean", pa.float64()),  # px, decoded against clipped flow; null: this video was not sampled
        ("flow_error_rms", pa.float64()),
        ("flow_error_p999", pa.float64()),
        ("flow_error_max", pa.float64()),
        ("rgb", pa.large_binary()),
        ("flow", pa.large_binary()),
    ]
)
BLOBS = ("rgb", "flow")
FACTS = tuple(name for name in ROW_SCHEMA.names if name not in BLOBS)
# What stands for null in the JSON of a WebDataset sample: Hugging Face datasets takes the type of a field from the
# first samples, and after nulls only it would refuse the first number.
OPTIONAL_FACTS = ("start", "end", "flow_error_mean", "flow_error_rms", "flow_error_p999", "flow_error_max")
ABSENT = -1.0

# One row per catalog video, in videos.parquet and in the commit records.
VIDEO_SCHEMA = pa.schema(
    [
        *[ROW_SCHEMA.field(name) for name in FACTS],
        ("status", pa.string()),  # "ok", "missing" or "quarantined"
        ("shard", pa.string()),  # the shard's name; also where a missing video would have gone
        ("rgb_bytes", pa.int64()),
        ("flow_bytes", pa.int64()),
        ("stage", pa.string()),  # where it failed: "decode" (fetching included), "flow" or "encode"
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
    ]
)
QUARANTINE_COLUMNS = ("id", "source", "split", "class_name", "shard", "stage", "error_kind", "error_message")


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How rows are put into files."""

    format: ShardFormat = "parquet"
    """Parquet files, or WebDataset tars."""
    videos_per_shard: int = 32
    """Videos per shard; a machine that dies loses at most one shard's work."""

    def __post_init__(self) -> None:
        if self.videos_per_shard < 1:
            raise SettingsError(f"--videos-per-shard is {self.videos_per_shard}: it must be at least 1")

    @property
    def extension(self) -> str:
        return {"parquet": "parquet", "webdataset": "tar"}[self.format]


def shard_name(split: str, index: int) -> str:
    """`train-00000`: what a shard, its commit record and its rows' `shard` field are called."""
    return f"{split}-{index:05d}"


def shard_uri(output: str, name: str, extension: str) -> str:
    return storage.join(output, "shards", f"{name}.{extension}")


def digest(value: object) -> str:
    """Sha256 of a value's canonical JSON."""
    return hashlib.sha256(records.encode(value)).hexdigest()


def write_rows(file: Sink, rows: Iterable[Row], settings: ShardSettings, convention: ShardConvention) -> int:
    """Write rows as a shard, each as it comes and none held for longer; how many there were.

    `convention`, how flow and RGB are read, goes into the schema metadata or each sample.
    """
    return {"parquet": _write_parquet, "webdataset": _write_tar}[settings.format](file, rows, convention)


def _write_parquet(file: Sink, rows: Iterable[Row], convention: ShardConvention) -> int:
    schema = ROW_SCHEMA.with_metadata({"convention": json.dumps(convention.to_json(), sort_keys=True)})
    count = 0
    # Blobs are compressed already, and statistics of them would be copies of them.
    with pq.ParquetWriter(
        file, schema, compression="none", use_dictionary=False, write_statistics=list(FACTS), store_schema=True
    ) as writer:
        for row in rows:
            # A row group a row: training reads rows in random order, and a row group is what can be read.
            writer.write_table(pa.table({name: [row[name]] for name in schema.names}, schema=schema))
            count += 1
            del row  # before the next one is made
    return count


def _write_tar(file: Sink, rows: Iterable[Row], convention: ShardConvention) -> int:
    described = convention.to_json()
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            facts = {name: row[name] for name in FACTS}
            facts.update({name: ABSENT for name in OPTIONAL_FACTS if row[name] is None})
            key = _sample_key(row["id"])
            _add_member(tar, f"{key}.json", records.encode({**facts, "convention": described}))
            for blob in BLOBS:
                _add_member(tar, f"{key}.{convention.members[blob]}", _as_bytes(row[blob]))
            count += 1
            del row  # before the next one is made
    return count


def _sample_key(video: str) -> str:
    # Hugging Face datasets passes over files whose name begins with two underscores; some of YouTube's ids do.
    return f"%5F{video[1:]}" if video.startswith("__") else video


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, owner and mode are TarInfo's constants: the bytes never depend on the clock
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _as_bytes(value: object) -> bytes:
    assert isinstance(value, bytes), type(value)
    return value


@dataclass(frozen=True, kw_only=True)
class Commit(CommitRecord):
    """What vouches for a shard: written after it, read at a restart and when the data set is assembled."""

    file: str | None  # relative to the output; null where no video of the shard could be used
    num_rows: int
    num_bytes: int
    sha256: str | None

    @property
    def stored(self) -> tuple[StoredFile, ...]:
        """The shard's file; none where no video of it could be used."""
        if self.file is None:
            return ()
        assert self.sha256 is not None
        return (StoredFile(path=self.file, num_bytes=self.num_bytes, sha256=self.sha256),)

    def to_json(self) -> Values:
        """The record as plain values, whose rows are not copies."""
        return dict(vars(self))


def commit_shard(
    output: str,
    name: str,
    rows: Iterable[Row],
    *,
    settings: ShardSettings,
    convention: ShardConvention,
    fingerprint: str,
) -> Commit:
    """Put the shard, then its commit record, each atomically.

    rows: one for each video that was planned, with all fields of VIDEO_SCHEMA, and with its blobs where its status is
    "ok". Each goes into the file as it comes: no more than one is held.
    """
    file = f"shards/{name}.{settings.extension}"
    videos: list[Row] = []
    with storage.draft(storage.join(output, file)) as draft:
        num_rows = write_rows(draft, _take_usable(rows, videos), settings, convention)
        commit = Commit(
            shard=name,
            split=str(videos[0]["split"]),
            file=file if num_rows else None,
            num_rows=num_rows,
            num_bytes=draft.num_bytes if num_rows else 0,
            sha256=draft.sha256 if num_rows else None,
            fingerprint=fingerprint,
            videos=videos,
        )
        # Whoever reads the folder without its records must not meet a shard that an interrupted run left.
        commits.put_commit(output, commit, draft.put if num_rows else lambda: storage.delete(draft.uri))
    return commit


def _take_usable(rows: Iterable[Row], videos: list[Row]) -> Iterator[Row]:
    """Pass on the rows that go into a shard; `videos` gets what is kept of every one."""
    for row in rows:
        videos.append(describe(row))
        if row["status"] == "ok":
            yield row
        del row  # before the next one is made


def describe(row: Row) -> Row:
    """What videos.parquet keeps of a row: everything but the blobs, of which it keeps the sizes."""
    sizes = {f"{blob}_bytes": len(row[blob]) if row.get(blob) is not None else None for blob in BLOBS}
    return {name: sizes.get(name, row.get(name)) for name in VIDEO_SCHEMA.names}


def list_shards(output: str) -> dict[str, int]:
    """The shard files of an output, relative to it, and their sizes in bytes."""
    folder = storage.join(output, "shards")
    return {f"shards/{file.path}": file.size for file in storage.list_files(folder)} if storage.is_dir(folder) else {}


def read_commit(output: str, name: str) -> Commit:
    """The commit record of one shard. Raises FileNotFoundError where there is none."""
    return commits.read_commit(output, name, Commit)


def read_commits(output: str) -> Iterator[Commit]:
    """The commit records of an output in order of shard name; none where nothing was committed yet."""
    return commits.read_commits(output, Commit)


def write_tables(output: str, commits: Iterable[C], schema: pa.Schema = VIDEO_SCHEMA) -> Iterator[C]:
    """Write videos.parquet and quarantine.parquet from commit records, which are passed on one by one on the way.

    The files are put when the last record has passed; `schema` is that of the records' videos.
    """
    quarantine_schema = pa.schema([schema.field(name) for name in QUARANTINE_COLUMNS])
    sinks = {"videos": pa.BufferOutputStream(), "quarantine": pa.BufferOutputStream()}
    with (
        pq.ParquetWriter(sinks["videos"], schema) as videos,
        pq.ParquetWriter(sinks["quarantine"], quarantine_schema) as quarantine,
    ):
        for some in _chunks(commits, COMMITS_PER_ROW_GROUP):
            table = pa.Table.from_pylist([row for commit in some for row in commit.videos], schema=schema)
            videos.write_table(table)
            failed = table.filter(pc.equal(table["status"], "quarantined"))
            quarantine.write_table(failed.select(list(QUARANTINE_COLUMNS)))
            yield from some
    for name, sink in sinks.items():
        storage.put(storage.join(output, f"{name}.parquet"), bytes(sink.getvalue()))


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of facts (videos.parquet, scores.parquet), or some of its columns.

    Raises OSError where it cannot be opened, DataError where it is no whole Parquet file or lacks a column.
    """
    # Neither pq.read_table nor pre_buffer: their threads may have the file in their hands still when the process ends,
    # and abort it.
    try:
        parquet = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)), pre_buffer=False)
        names = parquet.schema_arrow.names
        wanted = list(columns or names)
        if absent := set(wanted) - set(names):
            raise DataError(f"{uri} has no column {', '.join(sorted(absent))}; it has {', '.join(names)}")
        return parquet.read(columns=wanted, use_threads=False).select(wanted)
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} is damaged, or no Parquet file: {error}. Run the job that wrote it again") from error


def read_rows(uri: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of one shard file (.parquet or .tar), in order, with the blobs as bytes.

    Each row carries `convention`, which says how its flow and RGB are to be read: hand its `flow` to the codec, which
    refuses one it does not know. Raises ValueError where the file is no shard, or of another schema version.
    """
    if uri.endswith(".tar"):
        yield from _read_tar(uri, columns)
    else:
        yield from _read_parquet(uri, columns)


def _read_parquet(uri: str, columns: Sequence[str] | None) -> Iterator[Row]:
    with storage.open_read(uri) as file:
        parquet = pq.ParquetFile(file)
        convention = _convention_of(parquet, uri)
        for group in range(parquet.num_row_groups):
            for row in parquet.read_row_group(group, columns=list(columns) if columns else None).to_pylist():
                yield {**row, "convention": convention}


def _read_tar(uri: str, columns: Sequence[str] | None) -> Iterator[Row]:
    wanted = set(columns or ROW_SCHEMA.names)
    with storage.open_read(uri) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = iter(tar)
        for member in members:
            facts = json.loads(_member_bytes(tar, member)) if member.name.endswith(".json") else {}
            convention = ShardConvention.from_json(facts.get("convention"), where=uri)
            row = {name: facts[name] for name in FACTS if name in wanted}
            row.update({name: None for name in OPTIONAL_FACTS if row.get(name) == ABSENT})
            for blob in BLOBS:
                member = next(members)
                if blob in wanted:
                    row[blob] = _member_bytes(tar, member)
            yield {**row, "convention": convention}


def read_row(uri: str, index: int, blobs: Sequence[str], *, version: str = "") -> Row:
    """One row of a shard file by its place: its id, the blobs asked for, and `convention`; nothing else is fetched.

    Where the rows of a file begin is remembered from call to call, for as long as its `version` (a hash) stays the
    same. From a tar that takes one pass over its headers, from Parquet one read of its footer.
    Raises ValueError where the file is no shard, IndexError where it has fewer rows.
    """
    return (_read_tar_row if uri.endswith(".tar") else _read_parquet_row)(uri, index, blobs, version)


@lru_cache(maxsize=64)
def _parquet_footer(uri: str, version: str) -> tuple[pq.FileMetaData, ShardConvention]:
    with storage.open_read(uri) as file:
        parquet = pq.ParquetFile(file)
        convention = _convention_of(parquet, uri)
        return parquet.metadata, convention


def _convention_of(parquet: pq.ParquetFile, uri: str) -> ShardConvention:
    text = (parquet.schema_arrow.metadata or {}).get(b"convention", b"{}")
    return ShardConvention.from_json(records.parse(text, uri), where=uri)


def _read_parquet_row(uri: str, index: int, blobs: Sequence[str], version: str) -> Row:
    footer, convention = _parquet_footer(uri, version)
    left = index
    for group in range(footer.num_row_groups):
        if left < (count := footer.row_group(group).num_rows):
            with storage.open_read(uri) as file:
                table = pq.ParquetFile(file, metadata=footer).read_row_group(group, columns=["id", *blobs])
            return {**table.slice(left, 1).to_pylist()[0], "convention": convention}
        left -= count
    raise IndexError(f"{uri} has {format_count(footer.num_rows, 'row')}; asked for was row {index}")


@lru_cache(maxsize=64)
def _tar_samples(uri: str, version: str) -> list[dict[str, tuple[int, int]]]:
    """For each sample its facts ("json") and blobs: where their bytes begin, and how many they are."""
    with storage.open_read(uri) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        places = [(member.offset_data, member.size) for member in tar]
    parts = 1 + len(BLOBS)
    return [dict(zip(("json", *BLOBS), places[i : i + parts], strict=True)) for i in range(0, len(places), parts)]


def _read_tar_row(uri: str, index: int, blobs: Sequence[str], version: str) -> Row:
    samples = _tar_samples(uri, version)
    if index >= len(samples):
        raise IndexError(f"{uri} has {format_count(len(samples), 'row')}; asked for was row {index}")
    parts = {}
    with storage.open_read(uri) as file:
        for name in ("json", *blobs):
            offset, size = samples[index][name]
            file.seek(offset)
            parts[name] = file.read(size)
    facts = json.loads(parts.pop("json"))
    convention = ShardConvention.from_json(facts.get("convention"), where=uri)
    return {"id": facts["id"], **parts, "convention": convention}


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    reader = tar.extractfile(member)
    assert reader is not None, member.name
    return reader.read()
