"""What a run over features is to do: which video goes into which shard, and all that decides about their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import pyarrow as pa
import torch
from tyro.conf import arg

from models.input_spec import Stream
from pipelines import storage, tvl1
from pipelines.datasets import shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.records import read_dataset
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import DataError, SettingsError
from pipelines.extraction.plan import LIMITS, find_libraries, list_decoding_constants
from pipelines.extraction.records import PlannedCatalog, PlanRecord
from pipelines.extraction.work import PLAN_SCHEMA, PlannedWork, hash_catalog, lay_out, name_shards
from pipelines.features.compute import BATCH, FeatureNetworks, StreamNetwork
from pipelines.features.records import SCHEMA_VERSION, FeatureCommit
from pipelines.features.settings import FeatureSettings
from pipelines.features.spool import BLOCK_BYTES
from pipelines.features.task import FeatureTask
from pipelines.media.codec import CodecSettings, check_convention, scale_of
from pipelines.media.decode import DecodeSettings
from pipelines.records import Values
from pipelines.training.weights_files import Which
from pipelines.tvl1.params import FlowPreset

# Beside the columns of a plan: what a row of a data set's shard is, and what is known of it.
STORED_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("file", pa.string()),
    ("row", pa.int32()),
    ("version", pa.string()),
    ("source_sha256", pa.string()),
    ("fps", pa.float64()),
    ("source_fps", pa.float64()),
    ("num_frames", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("timing", pa.string()),
    ("partial", pa.bool_()),
)
FACTS = ("source_sha256", "fps", "source_fps", "timing", "partial", "start", "end")  # that an index lacks
STORED_SCHEMA = pa.schema([*PLAN_SCHEMA, *STORED_COLUMNS])
FOLDERS = ("features", "features/rgb", "features/flow", "windows")  # of an output, that hold files of features

TASK_BYTES = 1_280 << 20  # of a worker with two networks of width 1, a window of 64 frames in them, and its decoder
CROP_BYTES = 21  # a pixel of a window, for each crop more: of RGB and flow as they are kept, shown and joined
BLOCKS = 3  # of vectors, while they become files


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a video, and its decoder, may cost before it is given up."""

    max_frames: int = 500_000
    """A video or span with more frames goes to quarantine (500,000 are 4½ hours at 30 fps)."""
    max_gap_s: Annotated[float, arg(name="max-gap")] = 300.0
    """A video with a longer pause between two frames, in seconds, goes to quarantine; repeats fill a shorter one."""
    timeout_s: Annotated[float, arg(name="decode-timeout")] = 60.0
    """Seconds without a sign of life after which a decoder counts as hung."""
    memory_limit_mb: Annotated[int | None, arg(name="decode-memory")] = 3072
    """Address space of the decoder process in MiB. None: no limit."""
    cpu_limit_s: Annotated[int | None, arg(name="decode-cpu-limit")] = 14_400
    """Processor seconds that one video may take to decode. None: no limit."""

    def __post_init__(self) -> None:
        DecodeSettings(**asdict(self))  # whose flags these are


@dataclass(frozen=True, kw_only=True)
class FeaturePlan(PlannedWork):
    """Videos or rows of shards, and what is made of them."""

    commit_kind = FeatureCommit
    folders = FOLDERS

    task: FeatureTask
    per_shard: int

    @property
    def videos_per_shard(self) -> int:
        """Videos in a shard, at most."""
        return self.per_shard

    def list_files(self) -> dict[str, int]:
        """The files of features that are in the output, relative to it, and their sizes in bytes."""
        return {
            f"{folder}/{file.path}": file.size
            for folder in ("features", "windows")
            if storage.is_dir(uri := storage.join(self.output, folder))
            for file in storage.list_files(uri)
        }


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A data set whose frames and flow are read in place of videos."""

    index: VideoIndex
    fingerprint: str

    @classmethod
    def read(cls, data: str, split: str | None) -> Stored:
        """The data set, or one split of it. Raises DataError where there is none."""
        index, dataset = read_index(data), read_dataset(storage.absolute(data))
        table = index.table
        facts = shards.read_table(storage.join(index.data, "videos.parquet"), FACTS)  # in the same order
        for name in FACTS:
            table = table.append_column(name, facts[name])
        index = replace(index, table=table)
        index = index.of_split(split) if split else index
        if "ok" not in index.table["status"].to_pylist():
            raise DataError(f"{data}: none of its {len(index):,} videos is in a shard; its report.html says why")
        return cls(index=index, fingerprint=dataset.fingerprint)

    def check(self, fps: float | str, streams: tuple[Stream, ...]) -> None:
        """Raises SettingsError where features at this rate cannot be made of these frames, and ConventionError."""
        if "flow" in streams:
            check_convention(self.index.convention.flow)
        stored = self.index.sampling
        if fps != stored.fps:
            raise SettingsError(
                f"--fps is {fps}, and {self.index.given or self.index.data} holds {stored.describe_rate()}: give --fps "
                f"{stored.fps}, or --videos in place of --data"
            )


def make_task(
    networks: FeatureNetworks,
    uris: Mapping[Stream, str],
    *,
    limits: Limits,
    flow_preset: FlowPreset,
    which: Which,
    precision: str,
    stored: Stored | None = None,
) -> FeatureTask:
    """What workers do, for networks that were loaded from these URIs. Raises SettingsError."""
    settings = networks.settings
    if stored is not None:
        stored.check(settings.fps, networks.streams)
        scale = scale_of(stored.index.convention.flow)
    else:
        scale = CodecSettings(bound=networks.flow_bound).flow_scale
    return FeatureTask(
        settings=settings,
        decode=_decode_settings(networks, limits),
        flow_preset=flow_preset,
        scale=scale,
        networks=tuple((stream, uris[stream], networks.hashes[stream]) for stream in networks.streams),
        which=which,
        precision=precision,
        data=None if stored is None else (stored.index.data, stored.fingerprint),
    )


def _decode_settings(networks: FeatureNetworks, limits: Limits) -> DecodeSettings:
    size, fps = networks.frame_size, networks.settings.fps
    exact = {network.clips.frame_size for network in networks.networks.values()}
    if networks.settings.frame_size is None and exact != {None}:
        if len(exact) > 1:
            raise SettingsError(
                f"the networks were trained on frames of different sizes ({' and '.join(sorted(map(str, exact)))}): "
                "say by --resize which size both get"
            )
        return DecodeSettings(fps=fps, frame_size=exact.pop(), **asdict(limits))
    if isinstance(size, int):
        return DecodeSettings(fps=fps, short_side=size, **asdict(limits))
    return DecodeSettings(fps=fps, frame_size=f"{size[0]}x{size[1]}", **asdict(limits))


def plan_videos(
    catalog: Catalog, task: FeatureTask, networks: FeatureNetworks, *, videos: str, output: str, kernel: str, size: int
) -> FeaturePlan:
    """Lay the catalog out in shards, each of at most `size` videos of one split, in catalog order."""
    table = lay_out(catalog.table, videos=videos, videos_per_shard=size)
    given: dict[str, Any] = {"output": output, "kernel": kernel, "size": size}
    return _plan(table, catalog.classes, task, networks, **given)


def plan_stored(
    stored: Stored, task: FeatureTask, networks: FeatureNetworks, *, output: str, kernel: str, size: int
) -> FeaturePlan:
    """Lay the rows of a data set out in shards; what is in none of its shards is missing."""
    found = stored.index.table
    columns = {
        **{name: found[name] for name in found.column_names},
        "path": found["file"],
        "index": range(len(found)),
        "shard": name_shards(found["split"].to_pylist(), size),
        "status": ["new" if status == "ok" else "missing" for status in found["status"].to_pylist()],
    }
    table = pa.table({name: columns[name] for name in STORED_SCHEMA.names}, schema=STORED_SCHEMA)
    given: dict[str, Any] = {"output": output, "kernel": kernel, "size": size}
    return _plan(table, stored.index.classes, task, networks, **given)


def _plan(
    table: pa.Table,
    classes: tuple[str, ...],
    task: FeatureTask,
    networks: FeatureNetworks,
    *,
    output: str,
    kernel: str,
    size: int,
) -> FeaturePlan:
    record = PlanRecord(
        schema_version=SCHEMA_VERSION,
        settings={**_name_settings(task, networks), "videos_per_shard": size, "kernel": kernel},
        derived=_derive(task),
        catalog=PlannedCatalog(videos=len(table), classes=classes, sha256=hash_catalog(table)),
    )
    return FeaturePlan(
        output=output,
        kernel=kernel,
        table=table,
        record=record,
        fingerprint=shards.digest(record),
        task_bytes=_estimate_memory(task.settings, networks),
        task=task,
        per_shard=size,
    )


def _name_settings(task: FeatureTask, networks: FeatureNetworks) -> Values:
    """All that decides about bytes, by the names that a refusal says."""
    decode = asdict(task.decode)
    for limit in LIMITS:
        del decode[limit]
    return {
        "features": {**asdict(task.settings), "streams": list(task.streams)},
        "weights": {stream: sha256 for stream, _, sha256 in task.networks},
        "seen": {stream: _name_input(network) for stream, network in networks.networks.items()},
        "precision": task.precision,
        **({"decode": decode, "flow_preset": task.flow_preset} if task.data is None else {"data": task.data[1]}),
        **({"flow_scale": asdict(task.scale)} if "flow" in task.streams else {}),
    }


def _name_input(network: StreamNetwork) -> Values:
    """What a network sees of a window, which its weights do not say."""
    seen: Values = {"crop": network.input_spec.size, "frame_step": network.frame_step, "resize": network.clips.resize}
    return seen if network.stream == "rgb" else {**seen, "flow_bound": network.clips.bound}


def _derive(task: FeatureTask) -> Values:
    """What names among the settings stand for in this version, and the libraries that make the bytes."""
    videos = {"tvl1": asdict(tvl1.PRESETS[task.flow_preset]), "decoding": list_decoding_constants()}
    libraries = {**find_libraries(), "torch": torch.__version__}
    return {**(videos if task.data is None else {}), "clips_at_a_time": dict(BATCH), "libraries": libraries}


def _estimate_memory(settings: FeatureSettings, networks: FeatureNetworks) -> int:
    """Bytes that a task is to reserve, whatever the length of its videos; see benchmarks/memory.py."""
    side = max(network.input_spec.size for network in networks.networks.values())
    crops = CROP_BYTES * (settings.crops - 1) * settings.window * side**2
    return TASK_BYTES + crops + BLOCKS * BLOCK_BYTES
