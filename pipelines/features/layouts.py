"""Features as files: one Parquet row per window, or the arrays that other projects load."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.input_spec import STREAMS, Stream
from pipelines.datasets.annotations import is_id, make_id
from pipelines.features.settings import FeatureSettings
from pipelines.features.windows import Windows, count_frames

Features = Mapping[Stream, npt.NDArray[np.floating]]
Array = npt.NDArray[np.number]


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What is written of a video beside its features; `num_frames` are at `fps`, of native frames the file's rate."""

    id: str
    num_frames: int
    fps: float
    class_name: str | None = None
    split: str | None = None


def make_schema(settings: FeatureSettings) -> pa.Schema:
    """Columns of the rows of windows: of the Parquet layout one row per window, stream and crop, with its vector; of
    the others one per window, which says when the rows of the arrays begin and end."""
    about = [(name, pa.string()) for name in ("id", "class_name", "split")]
    times = [("window", pa.int64()), ("start_s", pa.float64()), ("end_s", pa.float64())]
    if settings.layout != "parquet":
        return pa.schema([*about, *times])
    number = pa.from_numpy_dtype(np.dtype(settings.dtype))
    return pa.schema([*about, ("stream", pa.string()), ("crop", pa.int8()), *times, ("features", pa.list_(number))])


def make_rows(settings: FeatureSettings, windows: Windows, video: VideoFacts, features: Features) -> pa.Table:
    """The rows of a video, by `make_schema`: stream by stream, window by window, crop by crop."""
    schema = make_schema(settings)
    times = windows.times(count_frames(settings, video.num_frames), video.fps)
    if settings.layout != "parquet":
        return _table(schema, video, times, np.arange(len(times)))
    tables = []
    for stream in _streams(features):
        vectors = features[stream].reshape(len(times), settings.crops, -1)
        places, crops = np.divmod(np.arange(len(times) * settings.crops), settings.crops)
        offsets = np.arange(len(places) + 1, dtype=np.int32) * vectors.shape[2]
        lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
        tables.append(_table(schema, video, times, places, stream=stream, crop=crops, features=lists))
    return pa.concat_tables(tables)


def _table(
    schema: pa.Schema, video: VideoFacts, times: npt.NDArray[np.float64], places: npt.NDArray[np.int64], **more: object
) -> pa.Table:
    """One row for each of these places of windows; text in `more` is the same in all rows."""
    known = {"id": video.id, "class_name": video.class_name, "split": video.split, **more}
    columns = known | {"window": places, "start_s": times[places, 0], "end_s": times[places, 1]}
    return pa.table(
        [
            pa.array([columns[field.name]] * len(places), field.type)
            if isinstance(columns[field.name], str | None)
            else pa.array(columns[field.name], field.type)
            for field in schema
        ],
        schema=schema,
    )


def make_files(settings: FeatureSettings, windows: Windows, video: VideoFacts, features: Features) -> dict[str, bytes]:
    """The arrays of a video as relative paths and what lies there; none of the Parquet layout.

    Paths never lead out of the folder, whatever the id.
    """
    return {path: _encode(array) for path, array in _arrays(settings, windows, video, features)}


def list_files(settings: FeatureSettings, streams: tuple[Stream, ...], id: str) -> list[str]:
    """The relative paths at which `make_files` puts the arrays of a video."""
    name = file_name(id)
    match settings.layout:
        case "parquet":
            return []
        case "npy-streams":
            return [f"{stream}/{name}.npy" for stream in streams]
        case "video-features":
            return [f"{name}_{part}.npy" for part in (*streams, "fps", "timestamps_ms")]
        case _:
            return [f"{name}.npy"]


def _arrays(
    settings: FeatureSettings, windows: Windows, video: VideoFacts, features: Features
) -> Iterator[tuple[str, Array]]:
    streams = _streams(features)
    paths = list_files(settings, streams, video.id)
    match settings.layout:
        case "parquet":
            return
        case "npy-streams":
            arrays: list[Array] = [features[stream] for stream in streams]
        case "video-features":
            ends = windows.times(count_frames(settings, video.num_frames), video.fps)[:, 1]
            arrays = [*(features[stream] for stream in streams), np.array(video.fps), 1000 * ends]
        case _:
            joined = np.concatenate([features[stream] for stream in streams], axis=-1)
            arrays = [joined.T if settings.layout == "npy-transposed" else joined]
    yield from zip(paths, arrays, strict=True)


def _streams(features: Features) -> tuple[Stream, ...]:
    return tuple(stream for stream in STREAMS if stream in features)


def _encode(array: Array) -> bytes:
    """A .npy file: equal arrays are equal bytes. C-contiguous, which all readers take."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def file_name(id: str) -> str:
    """The name under which a video's files lie: its id, which is a catalog's and so a file's name already.

    Another text is made one as the catalog does it (`make_id`), so that no slash or `..` leads elsewhere.
    """
    return id if is_id(id) else make_id(id)
