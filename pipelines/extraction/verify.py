"""Is a data set what its records say? Shards against hashes, tables against each other, samples against their sources.

Each check yields findings, one for everything that is wrong; none means that it held. Nothing is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import records, storage, tvl1
from pipelines.datasets import shards
from pipelines.datasets.catalog import split_rank
from pipelines.datasets.records import DATASET, Dataset, ListedShard, ShardConvention
from pipelines.datasets.shards import Commit, Row
from pipelines.datasets.video_index import VideoIndex
from pipelines.errors import RecordError, VideoError
from pipelines.extraction.batches import BATCH_PIXELS, iter_batches
from pipelines.extraction.records import PLAN, PlanRecord
from pipelines.extraction.work import hash_catalog
from pipelines.formatting import format_count
from pipelines.media.codec import DECODING_ERRORS, decode_codes, decode_flow, decode_rgb, flow_error, scale_of
from pipelines.media.decode import DAY_S, MAX_LIMIT, DecodeSettings
from pipelines.media.decoder_process import process_decoder

TOLERANCE = 1.5  # times the stored flow's own error (or its step) that recomputed flow may differ by, in the mean
WINDOW = 64  # frames that are decoded at a time
NO_LIMITS: dict[str, Any] = {
    "max_frames": MAX_LIMIT,
    "max_gap_s": float(DAY_S),
    "memory_limit_mb": None,
    "cpu_limit_s": None,
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: where, and what."""

    where: str
    what: str


def check_shards(output: str, dataset: Dataset) -> Iterator[Finding]:
    """Each shard's bytes, hash and rows against its commit record and dataset.json, and files that no record knows."""
    commits = {commit.shard: commit for commit in shards.read_commits(output)}
    sizes = shards.list_shards(output)
    listed = {shard.file: shard for shard in dataset.shards}
    known = {commit.file for commit in commits.values() if commit.file}
    for file in sorted(listed.keys() - known):
        yield Finding(file, "dataset.json lists it, but no commit record vouches for it")
    for commit in commits.values():
        if commit.file is not None:
            yield from _check_shard(output, commit, listed.get(commit.file), sizes.get(commit.file))
    # What a run left that was cut off between a shard and its record.
    for file in sorted(sizes.keys() - known):
        yield Finding(file, "no commit record vouches for it")


def _check_shard(output: str, commit: Commit, listed: ListedShard | None, size: int | None) -> Iterator[Finding]:
    assert commit.file is not None
    if listed is None:
        yield Finding(commit.file, "dataset.json does not list it")
    elif (listed.rows, listed.bytes, listed.sha256) != (commit.num_rows, commit.num_bytes, commit.sha256):
        yield Finding(commit.file, "dataset.json and the commit record differ about it")
    if size is not None and size != commit.num_bytes:
        yield Finding(commit.file, f"has {size:,} bytes, its record says {commit.num_bytes:,}")
        return
    try:
        whole = storage.hash_file(storage.join(output, commit.file)) == commit.sha256
    except OSError as error:
        yield Finding(commit.file, f"cannot be read: {error}")
        return
    if not whole:
        yield Finding(commit.file, "its bytes are not those of its record (sha256)")


def check_catalog(output: str, dataset: Dataset) -> Iterator[Finding]:
    """Whether the commit records account for the catalog that the run began with: each of its rows, once."""
    uri = storage.join(output, PLAN)
    try:
        values = records.parse(storage.read_bytes(uri), uri)
    except (OSError, RecordError) as error:
        yield Finding(PLAN, f"cannot be read: {error}")
        return
    # The fingerprint is the hash of plan.json, so the file can be checked without its settings.
    if shards.digest(values) != dataset.fingerprint:
        yield Finding(PLAN, "its settings are not those that dataset.json was made with (fingerprint)")
        return  # what it says of the catalog says nothing of these records
    catalog = PlanRecord.from_json(values, where=uri).catalog
    commits = sorted(shards.read_commits(output), key=_place_in_catalog)
    for commit in commits:
        if commit.fingerprint != dataset.fingerprint:
            yield Finding(f"commits/{commit.shard}.json", "was made with other settings (fingerprint)")
    rows = [row for commit in commits for row in commit.videos]
    for name, count in Counter(row["id"] for row in rows).items():
        if count > 1:
            yield Finding(name, f"{count} commit records hold it")
    if len(rows) != catalog.videos:
        yield Finding(PLAN, f"the catalog has {format_count(catalog.videos, 'video')}, the records {len(rows):,}")
    elif hash_catalog(pa.Table.from_pylist(rows, schema=shards.VIDEO_SCHEMA)) != catalog.sha256:
        yield Finding(PLAN, "the records' ids, labels or splits are not those of the catalog (sha256)")


def _place_in_catalog(commit: Commit) -> tuple[int, str, int]:
    # By number, for train-100000 sorts before train-99999; a split's name may hold dashes too.
    return (*split_rank(commit.split), int(commit.shard.rpartition("-")[2]))


def check_tables(output: str, dataset: Dataset) -> Iterator[Finding]:
    """videos.parquet, quarantine.parquet and dataset.json against what the commit records say of each video."""
    expected = [row for commit in shards.read_commits(output) for row in commit.videos]
    videos = _read_table(output, "videos.parquet")
    if videos is None:
        yield Finding("videos.parquet", "cannot be read")
        return
    columns = ("id", "split", "status", "shard", "num_frames", "source_sha256")
    # Counted, not as sets: a row that is there twice is wrong, too.
    committed = Counter(tuple(row[name] for name in columns) for row in expected)
    tabulated = Counter(tuple(row[name] for name in columns) for row in videos)
    for row in sorted(((committed - tabulated) + (tabulated - committed)).elements(), key=str)[:20]:
        side = "the commit records" if row in committed else "videos.parquet"
        yield Finding("videos.parquet", f"only {side} say: {dict(zip(columns, row, strict=True))}")
    quarantined = {row["id"] for row in videos if row["status"] == "quarantined"}
    if {row["id"] for row in _read_table(output, "quarantine.parquet") or []} != quarantined:
        yield Finding("quarantine.parquet", "does not hold exactly the quarantined videos of videos.parquet")
    for split, counts in dataset.splits.items():
        statuses = Counter(row["status"] for row in videos if row["split"] == split)
        if any(getattr(counts, name) != statuses[name] for name in ("ok", "missing", "quarantined")):
            yield Finding(DATASET, f"counts of split {split} are not those of videos.parquet")


def _read_table(output: str, name: str) -> list[Row] | None:
    try:
        return list(shards.read_table(storage.join(output, name)).to_pylist())
    except (OSError, ValueError):
        return None


def choose_samples(index: VideoIndex, count: int, seed: int) -> list[Row]:
    """Some of the videos that lie in shards, unlabelled ones too, drawn by the seed."""
    places = np.flatnonzero(np.array(index.table["status"].to_pylist()) == "ok")
    chosen = np.random.default_rng(seed).permutation(places)[:count]
    # In the order of the shards, whose footers are then read once.
    return [index.row(int(place)) for place in sorted(chosen)]


def check_sample(video: Row) -> Iterator[Finding]:
    """Decodes one video of a shard, a window at a time: numbers of frames and sizes of both streams."""
    try:
        row = shards.read_row(video["file"], video["row"], ["rgb", "flow"], version=video["version"])
        num_frames, size = _measure(partial(decode_rgb, row["rgb"]))
        num_pairs, flow_size = _measure(partial(decode_codes, row["flow"], row["convention"].flow))
    except DECODING_ERRORS as error:
        yield Finding(video["id"], f"cannot be decoded: {type(error).__name__}: {error}")
        return
    if row["id"] != video["id"]:
        yield Finding(video["id"], f"its place in the shard holds {row['id']}")
    if (num_frames, num_pairs) != (video["num_frames"], video["num_frames"] - 1):
        yield Finding(video["id"], f"{num_frames} RGB and {num_pairs} flow frames; {video['num_frames']} were recorded")
    if num_pairs and size != flow_size:
        yield Finding(video["id"], f"RGB is {size}, flow {flow_size} rows and columns")


def _measure(decode_window: Callable[..., npt.NDArray[Any]]) -> tuple[int, tuple[int, ...]]:
    """Number of frames of a stream, and their rows and columns."""
    count, size = 0, (0, 0)
    while len(window := decode_window(start=count, stop=count + WINDOW)):
        count, size = count + len(window), window.shape[1:3]
    return count, size


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A sample's stored flow against flow computed anew from its source: absolute errors of components, in px."""

    video: str
    mean: float
    max: float


def compare_source(video: Row, facts: Row, videos: str, dataset: Dataset) -> Finding | Recomputed:
    """Decodes the source of a sample again and computes its flow; a finding where source or frames are others.

    `facts` is the video's row of videos.parquet. Nothing is held but a batch of frames, however long the video is.
    """
    sampling = dataset.sampling
    # It passed the limits that its extraction was given, which a data set does not record.
    settings = DecodeSettings(**asdict(sampling), **NO_LIMITS)
    try:
        with storage.local_copy(storage.join(videos, facts["source"])) as path:
            if storage.hash_file(path) != facts["source_sha256"]:
                return Finding(video["id"], f"{facts['source']} is not the file that it was made of (sha256)")
            frames = process_decoder(settings).frames(path, start=facts["start"], end=facts["end"])
            return _compare_flow(video, facts["source"], frames)
    except (VideoError, *DECODING_ERRORS) as error:
        return Finding(video["id"], f"{facts['source']}: {error}")


def _compare_flow(video: Row, source: str, frames: Iterable[npt.NDArray[np.uint8]]) -> Finding | Recomputed:
    row = shards.read_row(video["file"], video["row"], ["flow"], version=video["version"])
    convention: ShardConvention = row["convention"]
    # The preset that the shard was made with, whatever is the default by now.
    preset, bound = str(convention.tvl1["preset"]), scale_of(convention.flow).bound
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)  # as in the extraction: of frames once resized
    num_pairs, means, most = 0, [], 0.0
    for batch in iter_batches(grey, BATCH_PIXELS):
        computed = tvl1.flow(batch, preset=preset)
        stored = decode_flow(row["flow"], convention.flow, start=num_pairs, stop=num_pairs + len(computed))
        num_pairs += len(computed)
        # Where there are fewer, the numbers of frames will tell.
        if stored.shape == computed.shape:
            error = flow_error(computed, stored, bound)
            means += [error.mean] * len(computed)
            most = max(most, error.max)
    num_frames = num_pairs + 1  # a decoder that yields none raises
    if num_frames != video["num_frames"]:
        return Finding(
            video["id"], f"{source} gives {format_count(num_frames, 'frame')}; {video['num_frames']} were recorded"
        )
    if len(means) != num_pairs:
        return Finding(video["id"], f"of {num_pairs} flow frames {len(means)} are stored at the size of {source}")
    return Recomputed(video=video["id"], mean=float(np.mean(means or [0.0])), max=most)


def judge(samples: Sequence[Recomputed], dataset: Dataset) -> Iterator[Finding]:
    """Findings where recomputed flow is further from the stored one than storing it explains."""
    measured = dataset.flow_error_px
    scale = scale_of(dataset.convention.flow)
    step = 2 * scale.bound / scale.levels
    # Not equal: the kernels of another kind of processor give slightly other floats.
    allowed = TOLERANCE * max(measured.mean if measured else 0.0, step) + step
    for sample in samples:
        if sample.mean > allowed:
            yield Finding(sample.video, f"recomputed flow differs by {sample.mean:.3f} px, allowed is {allowed:.3f}")
