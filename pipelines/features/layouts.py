"""Features as files: one Parquet row per window, or the arrays that other projects load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.input_spec import STREAMS, Stream
from pipelines.datasets.annotations import is_id, make_id
from pipelines.features.settings import FeatureSettings
from pipelines.features.spool import Array, Vectors, split_blocks
from pipelines.features.windows import Windows, count_frames
from pipelines.storage import Draft

VideoVectors = Mapping[Stream, Vectors]  # of all windows of a video


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


def make_rows(
    settings: FeatureSettings, windows: Windows, video: VideoFacts, features: VideoVectors
) -> Iterator[pa.Table]:
    """The rows of a video, by `make_schema`: stream by stream, window by window, crop by crop; in tables of bounded
    size, which make one row group each."""
    schema = make_schema(settings)
    times = windows.times(count_frames(settings, video.num_frames), video.fps)
    if settings.layout != "parquet":
        yield _table(schema, video, times, np.arange(len(times)))
        return
    for stream in _streams(features):
        vectors = features[stream]
        for block in split_blocks(len(times), _item_bytes(vectors)):
            yield _make_block(settings, schema, video, times, stream, block, vectors[block])


def _make_block(
    settings: FeatureSettings,
    schema: pa.Schema,
    video: VideoFacts,
    times: npt.NDArray[np.float64],
    stream: Stream,
    block: slice,
    vectors: Array,
) -> pa.Table:
    vectors = vectors.reshape(len(vectors) * settings.crops, -1)
    places, crops = np.divmod(np.arange(len(vectors)), settings.crops)
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
    return _table(schema, video, times, block.start + places, stream=stream, crop=crops, features=lists)


def _item_bytes(vectors: Vectors) -> int:
    """Bytes of one window."""
    return prod(vectors.shape[1:]) * vectors.dtype.itemsize


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


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """A .npy file: where it lies, the shape (windows or channels first) and type of its array, and how its blocks come.

    Equal arrays are equal bytes. C-contiguous, which all readers take.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Iterator[Array]

    def write(self, file: IO[bytes] | Draft) -> None:
        """Write it block by block, once."""
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in self.blocks:
            file.write(block.tobytes())


def make_files(
    settings: FeatureSettings, windows: Windows, video: VideoFacts, features: VideoVectors
) -> Iterator[ArrayFile]:
    """The arrays of a video, at relative paths; none of the Parquet layout.

    Paths never lead out of the folder, whatever the id.
    """
    streams = _streams(features)
    paths = list_files(settings, streams, video.id)
    match settings.layout:
        case "parquet":
            return
        case "npy":
            yield _join(paths[0], [features[stream] for stream in streams])
        case "npy-transposed":
            yield _transpose(paths[0], [features[stream] for stream in streams])
        case "npy-streams":
            for path, stream in zip(paths, streams, strict=True):
                yield _join(path, [features[stream]])
        case "video-features":
            ends = windows.times(count_frames(settings, video.num_frames), video.fps)[:, 1]
            *of_streams, of_rate, of_times = paths
            for path, stream in zip(of_streams, streams, strict=True):
                yield _join(path, [features[stream]])
            yield _write_whole(of_rate, np.array(video.fps))
            yield _write_whole(of_times, 1000 * ends)


def _write_whole(path: str, array: Array) -> ArrayFile:
    return ArrayFile(path=path, shape=array.shape, dtype=array.dtype, blocks=iter([array]))


def _join(path: str, arrays: list[Vectors]) -> ArrayFile:
    """Along the last axis."""
    first = arrays[0]
    blocks = split_blocks(len(first), sum(map(_item_bytes, arrays)))
    return ArrayFile(
        path=path,
        shape=(*first.shape[:-1], sum(array.shape[-1] for array in arrays)),
        dtype=first.dtype,
        blocks=(np.concatenate([array[block] for array in arrays], axis=-1) for block in blocks),
    )


def _transpose(path: str, arrays: list[Vectors]) -> ArrayFile:
    """(channels, windows), one array below the other. Every window is read once for each block of channels."""
    first, length = arrays[0], len(arrays[0])

    def make_blocks() -> Iterator[Array]:
        for array in arrays:
            for channels in split_blocks(array.shape[1], length * array.dtype.itemsize):
                parts = [array[block][:, channels].T.copy() for block in split_blocks(length, _item_bytes(array))]
                yield np.concatenate(parts, axis=1)

    shape = (sum(array.shape[1] for array in arrays), length)
    return ArrayFile(path=path, shape=shape, dtype=first.dtype, blocks=make_blocks())


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


def _streams(features: VideoVectors) -> tuple[Stream, ...]:
    return tuple(stream for stream in STREAMS if stream in features)


def file_name(id: str) -> str:
    """The name under which a video's files lie: its id, which is a catalog's and so a file's name already.

    Another text is made one as the catalog does it (`make_id`), so that no slash or `..` leads elsewhere.
    """
    return id if is_id(id) else make_id(id)
