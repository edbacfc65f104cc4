"""Where the frames of a video come from: its file, or the row of a data set's shard. What is known of it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from models.input_spec import Stream
from pipelines.clips.numbered import check_storage, is_of_storage
from pipelines.datasets import shards
from pipelines.datasets.shards import Row
from pipelines.errors import VideoError
from pipelines.extraction.sources import HashedFile
from pipelines.features.task import FeatureTask
from pipelines.media import codec
from pipelines.media.codec import DECODING_ERRORS
from pipelines.media.decoder_process import process_decoder

WINDOW = 64  # frames of a stored stream that are decoded at a time


class VideoFile:
    """A fetched file; its frames can be read once."""

    def __init__(self, path: str, row: Row, task: FeatureTask) -> None:
        self.file = HashedFile(path)
        self.frames = process_decoder(task.decode).frames(path, start=row["start"], end=row["end"])
        self.size = (0, 0)
        self.num_frames = 0

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        for frame in self.frames:
            self.size = frame.shape[0], frame.shape[1]
            self.num_frames += 1
            yield frame

    def facts(self) -> Row:
        """What is known once all frames have passed. Raises VideoError where the file is another one by now."""
        info = self.frames.info
        return {
            "source_sha256": self.file.sha256(),
            "num_frames": self.num_frames,
            "height": self.size[0],
            "width": self.size[1],
            "fps": info.fps,
            "source_fps": info.source_fps,
            "timing": info.timing,
            "partial": info.partial,
        }


class StoredVideo:
    """The row of a shard: its streams, a window of frames at a time."""

    def __init__(self, row: Row, task: FeatureTask) -> None:
        self.streams = task.streams
        assert task.data is not None
        stored = _read_stored(row, self.streams, task.data[0])
        self.blobs: dict[Stream, bytes] = {stream: stored[stream] for stream in self.streams}
        self.convention = stored["convention"].flow
        self.length = int(row["num_frames"])

    def read(self, stream: Stream) -> Iterator[npt.NDArray[Any]]:
        """Batches of frames (n, H, W, 3), or of flow's stacked codes (n, 2H, W)."""
        num_frames = self.length - (stream == "flow")
        for start in range(0, num_frames, WINDOW):
            stop = min(start + WINDOW, num_frames)
            try:
                frames = self._decode(stream, start, stop)
            except DECODING_ERRORS as error:
                raise VideoError("corrupt", f"its stored {stream} cannot be decoded: {error}") from error
            if len(frames) < stop - start:
                found = start + len(frames)
                raise VideoError("truncated", f"its stored {stream} ends after {found} of {num_frames} frames")
            yield frames

    def _decode(self, stream: Stream, start: int, stop: int) -> npt.NDArray[Any]:
        if stream == "rgb":
            return codec.decode_rgb(self.blobs["rgb"], start=start, stop=stop)
        levels = codec.decode_codes(self.blobs["flow"], self.convention, start=start, stop=stop)
        return codec.stack_components(levels)


def _read_stored(row: Row, streams: tuple[Stream, ...], data: str) -> Row:
    """A row of a shard with the blobs of these streams. Raises VideoError, or OutageError where it is not its fault."""
    for again in (True, False):
        try:
            stored = shards.read_row(row["file"], row["row"], list(streams), version=row["version"])
            break
        except DECODING_ERRORS as error:
            if is_of_storage(error):
                check_storage(data, error)
                if again:  # it may have been away for a moment; what fails twice is the file's own fault
                    continue
            raise VideoError("unreadable", f"its shard cannot be read: {error}") from error
    if stored["id"] != row["id"]:
        raise VideoError("changed", f"its place in the shard holds {stored['id']}: was the data set made again?")
    return stored
