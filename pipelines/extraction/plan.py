"""What an extraction is to do: which video goes into which shard, and everything that decides about their bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tvl1
from pipelines.datasets import shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.records import SCHEMA_VERSION, FrameSampling, ShardConvention
from pipelines.datasets.shards import Commit, ShardSettings
from pipelines.errors import SettingsError
from pipelines.extraction.records import PlannedCatalog, PlanRecord
from pipelines.extraction.work import PlannedWork, hash_catalog, lay_out
from pipelines.media import decode, probe, resize, timestamps
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings
from pipelines.records import Values
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
class Plan(PlannedWork):
    """Catalog and settings, resolved."""

    commit_kind = Commit
    folders = ("shards",)

    settings: ExtractionSettings
    classes: tuple[str, ...]

    @property
    def videos_per_shard(self) -> int:
        """Videos in a shard, at most."""
        return self.settings.shards.videos_per_shard

    def list_files(self) -> dict[str, int]:
        """The shard files that are in the output, relative to it, and their sizes in bytes."""
        return shards.list_shards(self.output)


def make_plan(catalog: Catalog, settings: ExtractionSettings, *, videos: str, output: str, kernel: str) -> Plan:
    """Lay the catalog out in shards, each of at most `videos_per_shard` videos of one split, in catalog order."""
    table = catalog.table
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
        table=lay_out(table, videos=videos, videos_per_shard=settings.shards.videos_per_shard),
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
        "decoding": list_decoding_constants(),
        "encoding": settings.codec.describe_formats(),
        "libraries": find_libraries(),
    }


def find_libraries() -> dict[str, str]:
    """Versions of the libraries that the bytes come from, as they say themselves: OpenCV has many distributions."""
    return {
        "av": av.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pyarrow": pa.__version__,
    }


def list_decoding_constants() -> dict[str, str]:
    """Every constant that decides about frames beside the settings, under its name."""
    named = [(module, name) for module in DECODING for name in vars(module) if name.isupper() and name not in BOUNDS]
    return {f"{module.__name__.rpartition('.')[2]}.{name}": repr(getattr(module, name)) for module, name in named}


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
