"""What an extraction is to do: which video goes into which shard, under which settings, and what is left of it.

The plan is a function of catalog and settings alone, so every start of the same command makes the same one. plan.json
in the output holds settings and fingerprint; a start that disagrees with it is refused, for shards of two kinds in one
data set could never be told apart.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import records, storage, tvl1
from pipelines.datasets import shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.records import SCHEMA_VERSION, FrameSampling, ShardConvention
from pipelines.datasets.shards import Commit, ShardSettings
from pipelines.errors import SettingsError
from pipelines.extraction.records import PLAN, PlannedCatalog, PlanRecord
from pipelines.media import decode, probe, resize, timestamps
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings
from pipelines.records import Values
from pipelines.resume import was_begun
from pipelines.tvl1 import BACKENDS
from pipelines.tvl1.params import FlowPreset

# Settings that decide which videos are given up and not what the others become: a retry may raise them.
LIMITS = ("max_frames", "max_gap_s", "timeout_s", "memory_limit_mb", "cpu_limit_s")
DECODING = (probe, timestamps, decode, resize)  # modules whose constants decide what becomes of a video
# Constants of theirs that bound settings, and no more: a setting that is allowed means the same whatever they are.
BOUNDS = ("MIN_FPS", "MAX_FPS", "MAX_SHORT_SIDE", "MAX_SIDE", "PACKETS_OF_A_PICTURE", "DAY_S", "MAX_LIMIT")
TASK_BYTES = 600 << 20  # of a worker, its decoder and the frames on their way
STORED_BYTES = 0.5  # a pixel, of RGB and flow as they are stored, times the copies of a video when it is done
NATIVE_FPS = 60.0  # of a file whose own rate is kept, as far as memory goes: few record faster
LEAST_BYTES_S = 12_500  # of a source: what takes less, as a still picture does, takes little when it is stored, too
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
    """Decoding."""
    flow_preset: FlowPreset = "faithful"
    """TV-L1 settings: like OpenCV's (faithful), better (quality), or faster (fast)."""
    codec: CodecSettings = field(default_factory=CodecSettings)
    """Storage of RGB and flow."""
    shards: ShardSettings = field(default_factory=ShardSettings)
    """Shards."""
    error_sample_every: int = 16
    """The error of stored flow is measured on every so many videos of the catalog."""

    def __post_init__(self) -> None:
        if self.decode.frame_size == "native":
            raise SettingsError("--frame-size is native: shards hold frames of even sides; give WIDTHxHEIGHT, or None")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Catalog and settings, resolved."""

    output: str
    settings: ExtractionSettings
    kernel: str  # flow kernel and the kind of processor it was made for
    classes: tuple[str, ...]
    table: pa.Table  # PLAN_SCHEMA; the rows of a shard are contiguous
    record: PlanRecord
    fingerprint: str
    task_bytes: int  # of memory for a task to reserve

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
    record = PlanRecord(
        schema_version=SCHEMA_VERSION,
        settings={**_name_settings(settings), "kernel": kernel},
        derived=_derive(settings),
        catalog=PlannedCatalog(videos=len(table), classes=catalog.classes, sha256=hash_catalog(table)),
    )
    return Plan(
        output=output,
        settings=settings,
        kernel=kernel,
        classes=catalog.classes,
        table=pa.table({name: columns[name] for name in PLAN_SCHEMA.names}, schema=PLAN_SCHEMA),
        record=record,
        fingerprint=shards.digest(record),
        task_bytes=_estimate_memory(catalog, settings.decode),
    )


def _estimate_memory(catalog: Catalog, settings: DecodeSettings) -> int:
    """Bytes that a task is to reserve: of the longest video that there may be, 4:3; see benchmarks/memory.py."""
    fps = NATIVE_FPS if settings.fps == "native" else settings.fps
    height, width = settings.exact_size or (settings.short_side, settings.short_side * 4 / 3)
    seconds = [settings.max_frames / fps]
    lengths = pc.subtract(catalog.table["end"], catalog.table["start"])
    if len(lengths) and lengths.null_count == 0:
        seconds.append(max(0.0, pc.max(lengths).as_py()))
    if catalog.largest_bytes is not None:
        seconds.append(catalog.largest_bytes / LEAST_BYTES_S)
    pixels = min(seconds) * fps * height * width
    return TASK_BYTES + int(STORED_BYTES * pixels)


def _name_settings(settings: ExtractionSettings) -> Values:
    named = asdict(settings)
    for limit in LIMITS:
        del named["decode"][limit]
    return named


def _derive(settings: ExtractionSettings) -> Values:
    """What the names and Nones among the settings stand for in this version, and the libraries that make the bytes."""
    return {
        "flow_quality": settings.codec.resolved_flow_quality,
        "rgb_quality": settings.codec.resolved_rgb_quality,
        "tvl1": asdict(tvl1.PRESETS[settings.flow_preset]),
        "decoding": _list_constants(),
        "encoding": settings.codec.describe_formats(),
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


def _list_constants() -> dict[str, str]:
    """Every constant that decides about frames beside the settings, under its name."""
    named = [(module, name) for module in DECODING for name in vars(module) if name.isupper() and name not in BOUNDS]
    return {f"{module.__name__.rpartition('.')[2]}.{name}": repr(getattr(module, name)) for module, name in named}


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


def begin_output(plan: Plan) -> None:
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


def read_own_commits(plan: Plan) -> Iterator[Commit]:
    """The commit records of the output that were written under this plan."""
    return (commit for commit in shards.read_commits(plan.output) if commit.fingerprint == plan.fingerprint)


def find_committed(plan: Plan, *, verify: bool = False) -> dict[str, frozenset[str]]:
    """The shards of this plan that are there as their commit records say, each with the ids of the videos it holds.

    A shard that was lost, or cut off, since it was committed is none of them, so that it is made again. With `verify`
    neither is one of other bytes, for which every shard is read.
    """
    sizes = shards.list_shards(plan.output)
    return {
        commit.shard: frozenset(str(video["id"]) for video in commit.videos if video["status"] == "ok")
        for commit in read_own_commits(plan)
        if commit.file is None or sizes.get(commit.file) == commit.num_bytes
        if not verify or shards.fits(plan.output, commit)
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
        # One chunk: Ray makes a block of each.
        yield pa.concat_tables([rows, _pad(shard, size - len(rows))]).combine_chunks()


def find_work(plan: Plan, *, retry: bool = False, verify: bool = False) -> list[pa.Table]:
    """What an output still lacks of a plan: the blocks of `iter_blocks`; begins an output that was not begun.

    retry: also shards with videos in quarantine; verify: also those whose bytes are not those that were committed.
    The caller holds the output's lock. Raises SettingsChangedError where the output holds another plan.
    """
    # First: it refuses other settings, before anything there is touched.
    begin_output(plan)
    storage.remove_leftovers(
        plan.output, *(storage.join(plan.output, inner) for inner in ("shards", "commits", "runs"))
    )
    shards.settle(plan.output)
    return list(iter_blocks(plan, find_committed(plan, verify=verify), retry=retry))


def make_convention(settings: ExtractionSettings, kernel: str) -> ShardConvention:
    """How the blobs of a row were made and are to be read; it travels inside every shard."""
    return ShardConvention(
        flow=settings.codec.flow_convention(),
        tvl1={"preset": settings.flow_preset, "kernel": kernel, **asdict(tvl1.PRESETS[settings.flow_preset])},
        rgb={"codec": settings.codec.rgb_codec},
        sampling=asdict(sampling_of(settings.decode)),
        members={"rgb": "rgb.mp4", "flow": settings.codec.flow_extension},
    )


def sampling_of(settings: DecodeSettings) -> FrameSampling:
    """What readers of a data set may want to know of how its videos were decoded."""
    return FrameSampling(fps=settings.fps, short_side=settings.short_side, frame_size=settings.frame_size)


def _keep(rows: pa.Table, in_shard: frozenset[str]) -> pa.Table:
    status = ["kept" if row["id"] in in_shard else row["status"] for row in rows.to_pylist()]
    return rows.set_column(rows.column_names.index("status"), "status", pa.array(status, pa.string()))


def _pad(shard: str, count: int) -> pa.Table:
    return pa.Table.from_pylist([{"shard": shard, "status": "pad"}] * count, schema=PLAN_SCHEMA)
