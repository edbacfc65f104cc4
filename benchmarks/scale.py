"""What data sets of the size of Kinetics, and of ten million videos, take: the tables of docs/scale.md.

    python benchmarks/scale.py                             the tables, from inputs that were measured
    python benchmarks/scale.py --prices.spot-cpu-hour .02  the same at your prices; every input is such a flag
    python benchmarks/scale.py --measure CLIPS             the inputs, measured anew on the real clips of a folder

tests/test_scale.py holds the page to what this prints.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import multiprocessing
import os
import random
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from jobs.extraction_log import format_table
from pipelines.formatting import format_bytes

FRAMES = 250  # 10 s at 25 frames a second
VIDEOS_PER_SHARD = 32
LIST_KEYS = 1000  # keys in an answer of S3
PARALLEL_READS = 16  # of pipelines.storage.read_many
BUCKET = "s3://measured"  # on a server of its own


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured on one core of a 2-core AMD EPYC (Zen 5, AVX-512), Python 3.11."""

    decode_ms: float = 3.1
    """CPU milliseconds a frame: decoding and resizing to a shorter side of 256."""
    encode_rgb_ms: float = 2.6
    """CPU milliseconds a frame: H.264, crf 20."""
    flow_ms: float = 33.0
    """CPU milliseconds a frame: TV-L1, `faithful`."""
    gpu_pairs_per_s: float = 2200.0
    """Flow, pairs of frames a second of one GPU (H100: 1,032 a second, computing 46.5 % of the time; gpu.py)."""
    encode_flow_ms: float = 6.3
    """CPU milliseconds a frame: quantising and 10-bit H.264, crf 15."""
    source_bytes: float = 536000.0
    """Bytes of a source video."""
    rgb_bytes: float = 2297.0
    """Bytes a frame in the shards."""
    flow_bytes: float = 1906.0
    """Bytes a frame in the shards."""
    gets_per_video: float = 1.0
    """GET and HEAD requests of an extraction for each video."""
    puts_per_shard: float = 4.0
    """PUT and LIST requests of an extraction for each shard."""
    gets_per_shard: float = 2.0
    """GET and HEAD requests for each shard: its commit record, read at a restart and at the end."""
    gets_per_clip: float = 5.0
    """GET and HEAD requests of a training for each clip."""
    read_bytes_per_clip: float = 852000.0
    """Bytes that S3 sends a training for each clip of RGB, read-ahead included."""
    commit_bytes: float = 24830.0
    """Bytes of the commit record of a shard of 32 videos."""
    table_bytes: float = 134.0
    """Bytes of videos.parquet for each video."""
    index_bytes: float = 412.0
    """Bytes of memory for each video in the index that a training holds."""
    key_bytes: float = 1276.0
    """Bytes of memory for each key while a listing is made."""
    catalog_ms: float = 0.046
    """Milliseconds of reading annotations and matching files, for each row."""
    plan_ms: float = 0.62
    """Milliseconds of planning and running the graph with steps that do nothing, for each row (planning.py)."""
    plan_bytes: float = 2619.0
    """Bytes of driver memory for each row (planning.py: 943 MB at 250,000 rows, 452 MB at 62,500)."""
    plan_base_bytes: float = 288e6
    """Bytes of driver memory that do not depend on rows."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Assumptions, in dollars, near what AWS asked in us-east-1; put in your own."""

    cpu_hour: float = 0.0513
    """An hour of one vCPU, on demand (c7a.8xlarge: 1.642 an hour, 32 vCPUs)."""
    spot_cpu_hour: float = 0.02
    """The same on the spot market."""
    gpu_hour: float = 4.1
    """An hour of one A100, on demand (p4d.24xlarge: 32.77 an hour, 8 GPUs)."""
    spot_gpu_hour: float = 1.6
    """The same on the spot market."""
    put: float = 0.005 / 1000
    """A PUT or LIST request."""
    get: float = 0.0004 / 1000
    """A GET or HEAD request."""
    gb_month: float = 0.023
    """A GB stored for a month."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Not measured: the GPU at hand was another, and S3 was one on this machine."""

    gpu_tflops: float = 312.0
    """Peak of a GPU in bfloat16, TFLOP/s (A100)."""
    gpu_utilisation: float = 0.2
    """Share of the peak that training reaches."""
    s3_get_ms: float = 30.0
    """Milliseconds from a GET to its answer."""
    s3_list_ms: float = 150.0
    """Milliseconds from a LIST to its 1000 keys."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What data sets of the size of Kinetics, and of ten million videos, take."""

    measured: Measured = field(default_factory=Measured)
    prices: Prices = field(default_factory=Prices)
    assumed: Assumed = field(default_factory=Assumed)
    measure: str | None = None
    """Folder of real clips: measure the inputs anew and print them, instead of the tables."""


@dataclass(frozen=True)
class DataSet:
    """A data set by its size; `train` videos are trained on."""

    name: str
    videos: int
    train: int


KINETICS = (DataSet("Kinetics-400", 306_000, 240_000), DataSet("Kinetics-700", 650_000, 545_000))
LARGE = DataSet("10 M videos", 10_000_000, 10_000_000)
CLIPS_SEEN = {"rgb": 115_000 * 384, "flow": 155_000 * 384}  # the released checkpoints' schedules
GFLOPS = {"rgb": 222.0, "flow": 205.0}  # forward, one clip of 64 frames


def main() -> None:
    config = tyro.cli(Scale, description=__doc__)
    if config.measure:
        for name, value in measure(Path(config.measure)).items():
            print(f"{name:16} {value:.4g}")
    else:
        print("\n\n".join(tables(config)))


def tables(config: Scale) -> list[str]:
    """The tables of docs/scale.md as text."""
    sets = (*KINETICS, LARGE)
    header = ("", *(data.name for data in sets))
    extraction = [extraction_figures(data, config) for data in sets]
    training = [training_figures(data, config) for data in KINETICS]
    driver = [driver_figures(data, config) for data in sets]
    return [
        format_table(header, _turn(extraction)),
        format_table(header[:3], _turn(training)),
        format_table(header, _turn(driver)),
    ]


def _turn(columns: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return [(name, *(column[name] for column in columns)) for name in columns[0]]


def extraction_figures(data: DataSet, config: Scale) -> dict[str, str]:
    """What turning videos into shards takes."""
    m, prices = config.measured, config.prices
    frames, shards = data.videos * FRAMES, data.videos / VIDEOS_PER_SHARD
    hours = {
        "decode": frames * m.decode_ms / 3.6e6,
        "flow": frames * m.flow_ms / 3.6e6,
        "encode": frames * (m.encode_rgb_ms + m.encode_flow_ms) / 3.6e6,
    }
    total = sum(hours.values())
    gpu_hours = frames / config.measured.gpu_pairs_per_s / 3600
    puts = shards * m.puts_per_shard + data.videos / LIST_KEYS
    gets = data.videos * m.gets_per_video + shards * m.gets_per_shard
    stored = frames * (m.rgb_bytes + m.flow_bytes)
    requests = puts * prices.put + gets * prices.get
    return {
        "CPU-hours: decode": f"{hours['decode']:,.0f}",
        "CPU-hours: flow": f"{hours['flow']:,.0f}",
        "CPU-hours: encode": f"{hours['encode']:,.0f}",
        "CPU-hours": f"{total:,.0f}",
        "hours on 1,000 CPUs": f"{total / 1000:,.1f}",
        "dollars, CPUs on demand": f"{total * prices.cpu_hour:,.0f}",
        "dollars, CPUs on spot": f"{total * prices.spot_cpu_hour:,.0f}",
        "GPU-hours for flow": f"{gpu_hours:,.0f}",
        "bytes read": format_bytes(data.videos * m.source_bytes),
        "bytes of RGB": format_bytes(frames * m.rgb_bytes),
        "bytes of flow": format_bytes(frames * m.flow_bytes),
        "PUT and LIST requests": f"{puts:,.0f}",
        "GET and HEAD requests": f"{gets:,.0f}",
        "dollars, requests": f"{requests:,.2f}",
        "dollars a month, shards stored": f"{stored / 1e9 * prices.gb_month:,.2f}",
    }


def training_figures(data: DataSet, config: Scale) -> dict[str, str]:
    """What training both streams on the released schedules takes; clips seen do not depend on the data set."""
    m, prices, assumed = config.measured, config.prices, config.assumed
    clips = sum(CLIPS_SEEN.values())
    flops = sum(3e9 * GFLOPS[stream] * CLIPS_SEEN[stream] for stream in CLIPS_SEEN)  # backward: twice forward
    hours = flops / (1e12 * assumed.gpu_tflops * assumed.gpu_utilisation) / 3600
    beside = m.read_bytes_per_clip - FRAMES * m.rgb_bytes  # the shard's footer, and what is read ahead
    read = clips * beside + FRAMES * (CLIPS_SEEN["rgb"] * m.rgb_bytes + CLIPS_SEEN["flow"] * m.flow_bytes)
    gets = clips * m.gets_per_clip
    return {
        "clips, both streams": f"{clips:,}",
        "epochs: RGB, flow": ", ".join(f"{seen / data.train:.0f}" for seen in CLIPS_SEEN.values()),
        "GPU-hours (not measured)": f"{hours:,.0f}",
        "dollars, GPUs on demand": f"{hours * prices.gpu_hour:,.0f}",
        "dollars, GPUs on spot": f"{hours * prices.spot_gpu_hour:,.0f}",
        "bytes read": format_bytes(read),
        "GET and HEAD requests": f"{gets:,.0f}",
        "dollars, requests": f"{gets * prices.get:,.0f}",
        "GET and HEAD requests an epoch of RGB": f"{data.train * m.gets_per_clip:,.0f}",
    }


def driver_figures(data: DataSet, config: Scale) -> dict[str, str]:
    """What one driver, one listing and one table have to bear."""
    m, assumed = config.measured, config.assumed
    shards = data.videos / VIDEOS_PER_SHARD
    frame_ms = m.decode_ms + m.flow_ms + m.encode_rgb_ms + m.encode_flow_ms
    shard_s = VIDEOS_PER_SHARD * FRAMES * frame_ms / 1000
    reads_s = shards / PARALLEL_READS * assumed.s3_get_ms / 1000
    return {
        "shards, and commit records": f"{shards:,.0f}",
        "driver memory": format_bytes(m.plan_base_bytes + data.videos * m.plan_bytes),
        "minutes of the driver's own work": f"{data.videos * m.plan_ms / 6e4:,.1f}",
        "CPUs that one driver keeps busy": f"{shard_s / (VIDEOS_PER_SHARD * m.plan_ms / 1000):,.0f}",
        "minutes to read annotations and match files": f"{data.videos * m.catalog_ms / 6e4:,.1f}",
        "LIST requests for the videos": f"{data.videos / LIST_KEYS:,.0f}",
        "minutes for them, one after the other": f"{data.videos / LIST_KEYS * assumed.s3_list_ms / 6e4:,.1f}",
        "driver memory of that listing": format_bytes(data.videos * m.key_bytes),
        "bytes of commit records": format_bytes(shards * m.commit_bytes),
        "minutes to read them, at a restart and at the end": f"{reads_s / 60:,.1f}",
        "bytes of videos.parquet": format_bytes(data.videos * m.table_bytes),
        "memory of a training's index": format_bytes(data.videos * m.index_bytes),
    }


def measure(clips: Path) -> dict[str, float]:
    """The inputs of `Measured` but planning.py's, which takes minutes: measured here and now."""
    steps = measure_steps(clips)
    with tempfile.TemporaryDirectory() as folder:
        return {**steps, **measure_requests(Path(folder), steps), **measure_tables()}


def measure_steps(clips: Path) -> dict[str, float]:
    """CPU time and bytes of the steps, over all frames of the clips."""
    import cv2

    from pipelines import tvl1
    from pipelines.extraction.plan import ExtractionSettings
    from pipelines.media import codec
    from pipelines.media.decode import decode

    settings = ExtractionSettings()
    cv2.setNumThreads(1)
    tvl1.prewarm("cpu")
    spent: Counter[str] = Counter()
    paths = sorted(clips.iterdir())
    for path in paths:
        with _clock(spent, "decode_ms"):
            frames = list(decode(path, settings=settings.decode))
        height, width = frames[0].shape[:2]
        rgb = codec.RGBEncoder(settings.codec, height=height, width=width)
        with _clock(spent, "encode_rgb_ms"):
            for frame in frames:
                rgb.write(frame)
            spent["rgb_bytes"] += len(rgb.close())
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        with _clock(spent, "flow_ms"):
            flows = [flow.copy() for flow in tvl1.iter_flow(grey, preset=settings.flow_preset, backend="cpu")]
        encoder = codec.FlowEncoder(settings.codec, height=height, width=width, fps=25.0)
        with _clock(spent, "encode_flow_ms"):
            for flow in flows:
                encoder.write_levels(codec.stack_components(codec.quantise(flow, settings.codec.flow_scale)))
            spent["flow_bytes"] += len(encoder.close())
        spent["frames"] += len(frames)
    num_frames = spent.pop("frames")
    kinetics = [path.stat().st_size for path in paths if path.name.startswith("k400")]
    return {name: value / num_frames for name, value in spent.items()} | {"source_bytes": sum(kinetics) / len(kinetics)}


@contextmanager
def _clock(spent: Counter[str], name: str) -> Iterator[None]:
    """Adds the CPU milliseconds of this process."""
    started = time.process_time()
    yield
    spent[name] += 1000 * (time.process_time() - started)  # type: ignore[assignment]


def measure_requests(folder: Path, sizes: dict[str, float]) -> dict[str, float]:
    """Requests of one small extraction, and of reading clips, counted by an S3 server on this machine."""
    from pipelines import storage, tvl1
    from pipelines.datasets.catalog import read_catalog
    from pipelines.datasets.motion_videos import write_motion_videos
    from pipelines.datasets.shards import ShardSettings
    from pipelines.extraction import manifest
    from pipelines.extraction.graph import Steps
    from pipelines.extraction.plan import ExtractionSettings, make_plan
    from pipelines.extraction.work import begin_output, find_committed, iter_blocks
    from pipelines.media.decode import DecodeSettings

    write_motion_videos(folder, videos_per_class=2, seed=0, num_frames=5, size=(64, 48))
    settings = ExtractionSettings(decode=DecodeSettings(short_side=48), shards=ShardSettings(videos_per_shard=3))
    with counting_server() as counted:
        for path in folder.rglob("*.mp4"):
            storage.put(f"{BUCKET}/videos/{path.relative_to(folder)}", path.read_bytes())
        catalog = read_catalog(f"{BUCKET}/videos")
        kernel = tvl1.kernel_target("cpu")
        plan = make_plan(catalog, settings, videos=f"{BUCKET}/videos", output=f"{BUCKET}/out", kernel=kernel)
        begin_output(plan)
        steps = Steps.of(plan, backend="cpu")
        blocks = list(iter_blocks(plan, {}, retry=False))
        counted.clear()
        for block in blocks:
            for row in block.to_pylist():
                steps.extract(row)
        of_videos = counted.copy()
        counted.clear()
        for block in blocks:
            steps.make_shard(block)
        counted.subtract(of_videos)
        of_commits = counted.copy()
        find_committed(plan)
        manifest.assemble(plan)
        of_shards = counted.copy()
        clips = _count_clip_reads(counted, sizes)
        listing = _measure_listing()
    return {
        "gets_per_video": of_videos["get"] / len(catalog.table),
        "puts_per_shard": of_commits["put"] / len(blocks),
        "gets_per_shard": of_shards["get"] / len(blocks),
        **clips,
        **listing,
    }


def _count_clip_reads(counted: Counter[str], sizes: dict[str, float], *, reads: int = 16) -> dict[str, float]:
    """Requests and bytes of reading the RGB of single rows of a shard that is as large as real ones."""
    from pipelines import storage
    from pipelines.datasets import shards
    from pipelines.datasets.records import ShardConvention

    blobs = {name: bytes(int(FRAMES * sizes[f"{name}_bytes"])) for name in ("rgb", "flow")}
    row = dict.fromkeys(shards.ROW_SCHEMA.names) | {"id": "video"} | blobs
    with storage.draft(f"{BUCKET}/shard.parquet") as draft:
        shards.write_rows(draft, [row] * VIDEOS_PER_SHARD, shards.ShardSettings(), ShardConvention(flow={}))
        draft.put()
    counted.clear()
    for version in range(reads):  # among thousands of shards hardly a footer is read twice
        shards.read_row(f"{BUCKET}/shard.parquet", 2 * version, ["rgb"], version=str(version))
    return {"gets_per_clip": counted["get"] / reads, "read_bytes_per_clip": counted["bytes"] / reads}


def _measure_listing(*, keys: int = 2000) -> dict[str, float]:
    """Memory of what storage.list_files holds of each key."""
    import fsspec

    names = [f"{BUCKET}/many/making class {key % 400}/video{key:06d}_000010_000020.mp4" for key in range(keys)]
    s3 = fsspec.filesystem("s3", use_listings_cache=False)
    s3.pipe(dict.fromkeys(names, b""))
    tracemalloc.start()
    found = s3.find(f"{BUCKET}/many", detail=True)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == keys
    return {"key_bytes": held / keys}


@contextmanager
def counting_server() -> Iterator[Counter[str]]:
    """An S3 server with an empty bucket; counts `put` (and LIST), `get` (and HEAD) and the `bytes` of its answers."""
    import fsspec
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    counted: Counter[str] = Counter()
    app = DomainDispatcherApplication(create_backend_app)

    def count(environ: dict[str, Any], start_response: Any) -> Any:
        listing = "list-type" in environ.get("QUERY_STRING", "")
        dear = listing or environ["REQUEST_METHOD"] in ("PUT", "POST")
        counted["put" if dear else "delete" if environ["REQUEST_METHOD"] == "DELETE" else "get"] += 1
        for part in app(environ, start_response):
            counted["bytes"] += len(part)
            yield part

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, count, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    keys = {"AWS_ACCESS_KEY_ID": "measuring", "AWS_SECRET_ACCESS_KEY": "measuring", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    fsspec.filesystem("s3").mkdir(BUCKET.removeprefix("s3://"))
    yield counted
    server.shutdown()


def measure_tables(*, rows: int = 64_000) -> dict[str, float]:
    """Bytes of commit records, of videos.parquet and of a training's index for each video, from made-up ones.

    Of the index it is the slope: another so many rows take so much more.
    """
    from pipelines import records

    with tempfile.TemporaryDirectory() as folder:
        outputs = [_write_made_up(f"{folder}/{count}", count) for count in (rows, 2 * rows)]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            less, more = pool.map(_index_memory, outputs, chunksize=1)
        return {
            "commit_bytes": len(records.encode(_make_commit(0))),
            "table_bytes": Path(outputs[0], "videos.parquet").stat().st_size / rows,
            "index_bytes": (more - less) / rows,
        }


def _write_made_up(output: str, rows: int) -> str:
    """The tables of a data set without its shards."""
    from pipelines import records
    from pipelines.datasets import shards
    from pipelines.datasets.records import DATASET, Dataset, ListedShard, ShardConvention

    commits = [_make_commit(first) for first in range(0, rows, VIDEOS_PER_SHARD)]
    for _ in shards.write_tables(output, iter(commits)):
        pass
    dataset = Dataset(
        fingerprint="",
        settings={"decode": {"fps": 25.0, "short_side": 256}},
        convention=ShardConvention(flow={}),
        classes=("a",),
        splits={},
        shards=tuple(
            ListedShard(file=commit.file, split=commit.split, rows=commit.num_rows, bytes=0, sha256=commit.sha256)
            for commit in commits
        ),
    )
    records.write(f"{output}/{DATASET}", dataset)
    return output


def _index_memory(output: str) -> float:
    """By how many bytes the memory of this process grows with the index of a data set."""
    from pipelines.datasets.video_index import read_index

    before = _resident_bytes()
    index = read_index(output)
    return (_resident_bytes() - before) if len(index) else 0.0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _make_commit(first: int) -> Any:
    """A commit record of 32 videos named as Kinetics names them."""
    from pipelines.datasets.shards import VIDEO_SCHEMA, Commit, shard_name

    def sha(what: object) -> str:
        return hashlib.sha256(str(what).encode()).hexdigest()

    name = shard_name("train", first // VIDEOS_PER_SHARD)
    videos = []
    for index in range(first, first + VIDEOS_PER_SHARD):
        noise = random.Random(index)
        facts = dict.fromkeys(VIDEO_SCHEMA.names) | {"id": f"{sha(index)[:11]}_000010_000020", "split": "train"}
        facts |= {"label": index % 400, "class_name": f"making class {index % 400}", "status": "ok", "shard": name}
        facts |= {"source": f"making class {index % 400}/{facts['id']}.mp4", "source_sha256": sha(-index)}
        facts |= {"fps": 25.0, "num_frames": FRAMES, "height": 256, "width": 340, "timing": "time", "partial": False}
        facts |= {"flow_mean": noise.random(), "flow_clipped": noise.random() / 100}
        videos.append(facts | {"rgb_bytes": noise.randrange(10**6), "flow_bytes": noise.randrange(10**6)})
    return Commit(
        shard=name,
        split="train",
        file=f"shards/{name}.parquet",
        num_rows=VIDEOS_PER_SHARD,
        num_bytes=30_000_000,
        sha256=sha(name),
        fingerprint=sha("plan"),
        videos=videos,
    )


if __name__ == "__main__":
    main()
