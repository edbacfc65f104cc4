"""One video stream as mp4 bytes in memory: the same bytes every time, read from the keyframe before a window.

One thread encodes and one decodes: a cluster is filled with videos rather than threads, and no byte depends on cores.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

# What is read came out of `VideoWriter`, or pretends to: FFmpeg is not to look what else it may be, such as a playlist.
READ = {"format": "mp4", "container_options": {"protocol_whitelist": "none"}}
FULL_RANGE, VIDEO_RANGE = 2, 1  # FFmpeg's AVCOL_RANGE_JPEG and AVCOL_RANGE_MPEG
MIN_RATE, MAX_RATE = 0.01, 1000.0  # frames a second: some files' own rate is beyond what players and encoders take
BT601 = 6  # FFmpeg's AVCOL_SPC_SMPTE170M: the matrix that OpenCV converts RGB with


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """How FFmpeg is asked to encode; flow uses the full range of codes, RGB the video range."""

    encoder: str
    pixel_format: str
    color_range: int
    options: Mapping[str, str]


class VideoWriter:
    """Encodes frames one at a time; `close` gives the mp4. Peak memory is the encoder's, not the video's."""

    def __init__(
        self, video_format: VideoFormat, *, height: int, width: int, fps: float, crf: int, keyframe_interval: int
    ) -> None:
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings to stderr and has no other switch
        self.num_frames = 0
        self._format = video_format
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        rate = Fraction(min(max(fps, MIN_RATE), MAX_RATE)).limit_denominator(1001)
        options = {"crf": str(crf), **video_format.options}
        stream = self._container.add_stream(video_format.encoder, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, video_format.pixel_format
        stream.codec_context.gop_size = keyframe_interval
        stream.codec_context.thread_count = 1
        stream.codec_context.color_range = video_format.color_range
        if video_format.color_range == VIDEO_RANGE:
            stream.codec_context.colorspace = BT601
        self._stream = stream

    def write_grey(self, image: npt.NDArray[np.integer]) -> None:
        """Append a (H, W) image of the format's depth; chroma planes, where the format has them, are set to grey."""
        height, width = image.shape
        frame = av.VideoFrame(width, height, self._format.pixel_format)
        luma, *chroma = frame.planes
        np.frombuffer(luma, image.dtype).reshape(height, -1)[:, :width] = image
        for plane in chroma:
            np.frombuffer(plane, image.dtype)[:] = 512 if image.dtype == np.uint16 else 128
        self._write(frame)

    def write_rgb(self, image: npt.NDArray[np.uint8]) -> None:
        """Append a (H, W, 3) RGB frame as 4:2:0; OpenCV converts with less error and bias than swscale's default."""
        yuv = cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420)
        self._write(av.VideoFrame.from_ndarray(yuv, format="yuv420p"))

    def _write(self, frame: av.VideoFrame) -> None:
        frame.pts = self.num_frames
        self.num_frames += 1
        with ordinary_priority() if self.num_frames == 1 else contextlib.nullcontext():
            packets = self._stream.encode(frame)
        self._container.mux(packets)

    def close(self) -> bytes:
        """The mp4 file's bytes, or b"" where no frame was written."""
        if self.num_frames == 0:
            return b""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()


@contextlib.contextmanager
def ordinary_priority() -> Iterator[None]:
    """Within, an encoder may start: afterwards no thread of this process has real-time priority that had none before.

    SVT-AV1, started by root, gives it to its own threads and to the one that calls it, whose child processes inherit
    it: a training among them that uses all cores then keeps even Ray and the shell from running.
    """
    ordinary = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_OTHER  # Linux has it
    try:
        yield
    finally:
        for thread in list_threads() if ordinary else ():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                if os.sched_getscheduler(thread) == os.SCHED_FIFO:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def list_threads() -> list[int]:
    """The threads of this process as the kernel numbers them; the calling one only where there is no /proc to ask."""
    try:
        return [int(path.name) for path in Path("/proc/self/task").iterdir()]
    except OSError:
        return [0]


def read_frames(data: bytes, *, start: int = 0) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames in display order with their indices, from the last keyframe at or before `start` on."""
    with av.open(io.BytesIO(data), **READ) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        ticks_per_frame = 1 / (stream.average_rate * stream.time_base)
        if start > 0:
            container.seek(int(start * ticks_per_frame), stream=stream)
        for frame in container.decode(stream):
            yield round(frame.pts / ticks_per_frame), frame


def find_keyframes(data: bytes) -> list[int]:
    """Indices of the frames that decoding can start at, in ascending order; nothing is decoded."""
    with av.open(io.BytesIO(data), **READ) as container:
        stream = container.streams.video[0]
        ticks_per_frame = 1 / (stream.average_rate * stream.time_base)
        keyframes = [packet.pts for packet in container.demux(stream) if packet.is_keyframe and packet.pts is not None]
    return sorted(round(pts / ticks_per_frame) for pts in keyframes)


@dataclass(frozen=True, kw_only=True)
class Area:
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def read_rgb(frame: av.VideoFrame, area: Area | None = None) -> npt.NDArray[np.uint8]:
    """A 4:2:0 frame that `VideoWriter.write_rgb` wrote, or an area of it, as (H, W, 3) RGB uint8."""
    if area is None:
        return cv2.cvtColor(frame.to_ndarray(), cv2.COLOR_YUV2RGB_I420)
    top, left = area.top // 2, area.left // 2  # in chroma samples, each of which is the colour of 2×2 pixels
    height, width = -(-(area.top + area.height) // 2) - top, -(-(area.left + area.width) // 2) - left
    packed = np.empty(6 * height * width, np.uint8)
    luma, chroma = packed[: 4 * height * width].reshape(2 * height, 2 * width), packed[4 * height * width :]
    planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
    luma[:] = planes[0][2 * top :, 2 * left :][: 2 * height, : 2 * width]
    for plane, target in zip(planes[1:], chroma.reshape(2, height, width), strict=True):
        target[:] = plane[top:, left:][:height, :width]
    rgb = cv2.cvtColor(packed.reshape(3 * height, 2 * width), cv2.COLOR_YUV2RGB_I420)
    odd = Area(top=area.top % 2, left=area.left % 2, height=area.height, width=area.width)
    return rgb[odd.slices]


def read_grey(frame: av.VideoFrame) -> npt.NDArray[np.integer]:
    """A frame's luma plane as it is stored, (H, W) uint8 or uint16, without any conversion of range or depth."""
    dtype: type[np.integer] = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
    return np.frombuffer(frame.planes[0], dtype).reshape(frame.height, -1)[:, : frame.width]
