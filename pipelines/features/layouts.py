"""Features as files: one Parquet row per window, or the arrays that other projects load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.input_spec import Stream
from pipelines.features.settings import FeatureSettings
from pipelines.features.windows import Windows

Features = Mapping[Stream, npt.NDArray[np.floating]]


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What is written of a video beside its features; `num_frames` are at `fps`, of native frames the file's rate."""

    id: str
    num_frames: int
    fps: float
    class_name: str | None = None
    split: str | None = None


def make_schema(settings: FeatureSettings) -> pa.Schema:
    """Columns of the rows of windows: id, class_name, split, stream, crop, start_s, end_s and, of the Parquet layout,
    features."""
    raise NotImplementedError


def make_rows(settings: FeatureSettings, windows: Windows, video: VideoFacts, features: Features) -> pa.Table:
    """A row for each window, stream and crop of a video, by `make_schema`."""
    raise NotImplementedError


def make_files(settings: FeatureSettings, windows: Windows, video: VideoFacts, features: Features) -> dict[str, bytes]:
    """The arrays of a video as relative paths and what lies there; none of the Parquet layout.

    Paths never lead out of the folder, whatever the id.
    """
    raise NotImplementedError
