"""I3D's features of every window of videos, with timestamps: from shards or straight from files.

    python jobs/extract_features.py --data SHARDS --rgb RUN --flow RUN --output OUT
    python jobs/extract_features.py video.mp4 other.avi --flow flow_imagenet.pt --output OUT --format npy

OUT/features/00000.parquet, …: one row per window and stream: id, stream, start_s, end_s, features (list of float32).
With --format npy the vectors lie in OUT/features/ID.STREAM.npy, (windows, features), and the Parquet files have no such
column. OUT/failed.parquet: what could not be decoded. Started again, it goes on after the last whole part.
"""

from __future__ import annotations

import io
import posixpath
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from jobs.cluster import check_precision, connect, count_processors, describe_workers
from jobs.command import locate_output, run_command
from pipelines import storage
from pipelines.datasets.annotations import make_path_ids
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import SettingsError
from pipelines.training.weights_files import Which
from pipelines.tvl1.params import FlowPreset

if TYPE_CHECKING:
    from pipelines.evaluation.features import Windows

Row = dict[str, Any]

SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("id", "class_name", "split", "stream")],
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        # Last, so that the table beside .npy files can do without it.
        ("features", pa.list_(pa.float32())),
    ]
)
FAILED = pa.schema([("id", pa.string()), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class ExtractFeatures:
    """Write I3D's feature vectors of windows of videos."""

    videos: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")] = ()
    """Video files, on disk or s3://."""
    data: str | None = None
    """Shards to read instead of video files, on disk or s3://."""
    output: str
    """Folder for the features, on disk or s3://."""
    rgb: str | None = None
    """I3D of the RGB stream: a run, a checkpoint or released weights."""
    flow: str | None = None
    """I3D of the flow stream, in the same forms."""
    which: Which = "last"
    """Which checkpoint of a run."""
    split: str | None = None
    """Take only this split of --data. None: all."""
    window: int = 64
    """Frames per window, at 25 frames per second."""
    step: int = 64
    """Frames between the starts of neighbouring windows."""
    format: Literal["parquet", "npy"] = "parquet"
    """Output format: Parquet files, or one .npy file per video and stream."""
    flow_preset: FlowPreset = "faithful"
    """TV-L1 preset for video files."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks. bf16 is faster on processors and GPUs that have it; fp16 needs a GPU."""
    videos_per_part: int = 256
    """Videos per Parquet file. After a crash, the file that was in work is computed again."""
    num_workers: int | None = None
    """Number of workers, each on a GPU if there are any. None: one per GPU, or one per CPU without GPUs."""
    num_cpus: int | None = None
    """CPUs of the Ray instance that the job starts on this machine. None: all."""
    num_gpus: int | None = None
    """GPUs to use. None: all; 0: extract on CPUs."""

    def __post_init__(self) -> None:
        if bool(self.videos) == (self.data is not None):
            raise SettingsError("give either video files or --data")
        if self.rgb is None and self.flow is None:
            raise SettingsError("no network is given: name one by --rgb, by --flow, or one by each")
        if self.videos_per_part < 1:
            raise SettingsError(f"--videos-per-part is {self.videos_per_part}: give at least 1")
        for uri in (*self.videos, self.data, self.output, self.rgb, self.flow):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, extract, print."""
    run_command(ExtractFeatures, run, __doc__)


def run(config: ExtractFeatures) -> None:
    """Extract the parts that are not there yet."""
    config = replace(config, output=locate_output(config.output))  # before networks are loaded
    source, rows = find_videos(config)
    print(f"videos      {len(rows):,}\nray         {connect(num_cpus=config.num_cpus)}", flush=True)
    # Not at the top: Ray reads its environment when it is imported, and `connect` sets it.
    from pipelines.evaluation import features

    cpus, gpus = count_processors(config.num_workers, config.num_gpus)
    check_precision(config.precision, gpus)
    num_workers = config.num_workers or gpus or int(cpus)
    given = {"rgb": config.rgb, "flow": config.flow}
    sources = tuple(
        features.NetworkSource(name=name, uri=uri, stream=name, which=config.which)
        for name, uri in given.items()
        if uri
    )
    windows = features.Windows(window=config.window, step=config.step)
    networks = {source.name: features.load_i3d(source) for source in sources}
    # Before any video: a window that is too short fails in every one of them.
    features.check_windows(windows, networks)
    extractor = features.Extractor(
        sources=sources, windows=windows, precision=config.precision, num_workers=num_workers, use_gpu=gpus > 0
    )
    read = features.ReadVideo(source, flow_preset=config.flow_preset)
    print(f"extracting  {describe_workers(config.precision, num_workers, use_gpu=gpus > 0)}", flush=True)
    wanted = features.want(networks)
    failed: list[Row] = []
    for part, first in enumerate(range(0, len(rows), config.videos_per_part)):
        uri = storage.join(config.output, "features", f"{part:05d}.parquet")
        if storage.exists(uri):
            continue
        places = range(first, min(first + config.videos_per_part, len(rows)))
        table: list[Row] = []
        for row in features.extract_features(extractor, read, wanted, places):
            video = rows[row["place"]]
            if row["error"]:
                failed.append({"id": video["id"], "error": row["error"]})
                # A video that fails costs itself only; the job goes on.
                print(f"failed      {video['id']}: {row['error']}", flush=True)
            else:
                table += [line for source in sources for line in describe(config, windows, video, row, source.name)]
        # The vectors are in the .npy files, if those were asked for.
        put_table(uri, table, SCHEMA if config.format == "parquet" else SCHEMA.remove(len(SCHEMA) - 1))
        print(f"part        {part:05d}: {len(table):,} windows of {len(places):,} videos", flush=True)
    if failed:
        put_table(storage.join(config.output, "failed.parquet"), failed, FAILED)
    print(f"output      {config.output}; {len(failed):,} failed")


def find_videos(config: ExtractFeatures) -> tuple[VideoIndex | tuple[str, ...], list[Row]]:
    """Where frames come from, and what is known of each video: id, class_name and split."""
    if config.data is None:
        # By the name alone, wherever the file lies: two of one name are refused.
        names = make_path_ids([posixpath.basename(uri) for uri in config.videos])
        if len(set(names)) < len(names):
            raise SettingsError("two of the video files have the same name: their features would have the same id")
        uris = tuple(storage.absolute(uri) for uri in config.videos)
        return uris, [{"id": name, "class_name": None, "split": None} for name in names]
    index = read_index(config.data).usable()
    index = index.of_split(config.split) if config.split else index
    return index, index.table.select(["id", "class_name", "split"]).to_pylist()


def describe(config: ExtractFeatures, windows: Windows, video: Row, row: Row, stream: str) -> list[Row]:
    """The rows of one video's windows; puts its .npy file where that is asked for."""
    from pipelines.evaluation.features import seconds_of

    vectors = np.asarray(row[f"features_{stream}"], np.float32)
    if config.format == "npy":
        sink = io.BytesIO()
        np.save(sink, vectors)
        uri = storage.join(config.output, "features", f"{video['id']}.{stream}.npy")
        storage.put(uri, sink.getvalue())
    return [
        {**video, "stream": stream, "start_s": start, "end_s": end, "features": vector}
        for vector, (start, end) in zip(vectors, seconds_of(windows, len(vectors)), strict=True)
    ]


def put_table(uri: str, rows: list[Row], schema: pa.Schema) -> None:
    """Write a Parquet file by one atomic put."""
    sink = io.BytesIO()
    columns = {name: [row[name] for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), sink)
    storage.put(uri, sink.getvalue())


if __name__ == "__main__":
    main()
