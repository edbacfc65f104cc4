"""A video file → RGB frames at a fixed rate, shorter side resized, rotation applied.

Everything here runs in the calling process and trusts FFmpeg not to crash. Real collections hold files on which it
does: `pipelines.media.decoder_process.Decoder` runs `decode` in a child process and is what the pipelines use.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, pairwise
from typing import Annotated, TypeVar

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from tyro.conf import arg

from pipelines.errors import Kind, SettingsError, VideoError
from pipelines.media.probe import (
    MAX_GAP_S,
    Probe,
    Span,
    Timing,
    duration_of,
    nominal_rate,
    open_video,
    packet_time,
    probe_packets,
    read_packets,
    seek,
    tick,
    time_zero,
)
from pipelines.media.resize import RGBFrame, Scaler, round_half_up

T = TypeVar("T")
MIN_DECODED_SHARE = 0.9
PROBED_FRAMES = 16
TRIM_MARGIN_S = 1.0
WHOLE_SHARE = 0.99  # headers are off by a little: below this share of its frames a video counts as partial


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How videos become frames, and what a decoder may cost before it is stopped."""

    fps: float = 25.0
    """Frames per second that videos are sampled at."""
    short_side: int = 256
    """Shorter side of the frames in pixels; an even number."""
    max_frames: int = 15_000
    """A video or span with more frames goes to quarantine (15,000 are 10 minutes at 25 fps)."""
    timeout_s: Annotated[float, arg(name="decode-timeout")] = 60.0
    """Seconds without a sign of life after which a decoder counts as hung."""
    memory_limit_mb: Annotated[int | None, arg(name="decode-memory")] = 3072
    """Address space of the decoder process in MiB. None: no limit."""
    cpu_limit_s: Annotated[int | None, arg(name="decode-cpu-limit")] = 3600
    """Processor seconds that one video may take. None: no limit."""

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000:
            raise SettingsError(f"fps is {self.fps}; give frames a second above 0 and up to 1000")
        if self.short_side < 2 or self.short_side % 2:
            raise SettingsError(f"short_side is {self.short_side}; give an even number of pixels, at least 2")
        if self.max_frames < 1:
            raise SettingsError(f"max_frames is {self.max_frames}; give at least 1")
        if not self.timeout_s > 0:
            raise SettingsError(f"timeout_s is {self.timeout_s}; give seconds above 0")
        if self.cpu_limit_s is not None and self.cpu_limit_s < 1:
            raise SettingsError(f"cpu_limit_s is {self.cpu_limit_s}; give at least 1, None for no limit")
        if self.memory_limit_mb is not None and self.memory_limit_mb < 512:
            raise SettingsError(
                f"memory_limit_mb is {self.memory_limit_mb}; FFmpeg needs at least 512, None for no limit"
            )


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the source was and how well it decoded; complete only after the last frame."""

    codec: str
    pixel_format: str
    source_height: int  # px, as stored, before rotation
    source_width: int
    source_fps: float  # nominal
    rotation: int  # degrees counterclockwise that were applied: 0, 90, 180, 270
    timing: Timing  # what placed frames in time; see `judge_timing`
    trimmed: bool  # True: cut to the span asked for; False: the whole file
    duration: float  # seconds of source that became frames
    source_frames: int  # decoded
    damaged_frames: int  # lost, or decoded with errors
    partial: bool  # some of the source is missing, but less than 1 - MIN_DECODED_SHARE
    frames: int  # yielded
    height: int  # px, yielded
    width: int


def decode(
    path: str | os.PathLike[str],
    *,
    settings: DecodeSettings,
    start: float | None = None,
    end: float | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Generator[RGBFrame, None, VideoInfo]:
    """Yield the (H,W,3) uint8 RGB frames of a local video one by one; the generator's return value is its VideoInfo.

    One thread, memory independent of the video's length. `start` and `end` (seconds) cut an untrimmed file, see
    `resolve_span`. Resizing is one bilinear swscale step from the source's pixel format (its support grows when it
    shrinks, so it does not alias), bit-exact on every CPU. Colours follow the stream's matrix and range tags (BT.601,
    limited range where it has none); HDR is not tone-mapped, transparency is dropped, fields are not deinterlaced.
    Raises VideoError, possibly after some frames: a file is kept, and flagged partial, if at least MIN_DECODED_SHARE of
    its frames are there and decode without error. `on_progress` is called for every packet.
    """
    fps = Fraction(settings.fps).limit_denominator(1001)
    with explain_errors():
        with open_video(path) as (container, stream):
            span = resolve_span(start, end, duration_of(container))
            probe = probe_packets(container, stream, span, on_progress)
        check_probe(probe, span, settings)
        if probe.timing == "time" and not rises(path, probe):
            probe = replace(probe, timing="order", seekable=False)
        with open_video(path) as (container, stream):
            source, scaler, count = _Source(container, stream, span, probe), Scaler(settings.short_side), 0
            for frame, repeats in resample(source.timed_frames(on_progress), fps=fps, slots=count_slots(span, fps)):
                count += repeats
                if count > settings.max_frames:
                    raise too_long(settings, f"over {settings.max_frames} frames")
                picture = scaler.convert(frame)
                for _ in range(repeats):
                    yield picture
            source.check()
            if count == 0:
                raise VideoError("empty_span", f"the video ends before the span, which starts at {start} s")
            return source.info(scaler, frames=count, duration=float(count / fps))


@contextmanager
def explain_errors() -> Iterator[None]:
    """Turn what PyAV raises into VideoError."""
    try:
        yield
    except MemoryError as error:
        raise VideoError("out_of_memory", "decoding needs more memory than there is (memory_limit_mb)") from error
    except av.error.FFmpegError as error:
        raise VideoError("unreadable", f"FFmpeg cannot read the file: {describe(error)}") from error


def describe(error: av.error.FFmpegError) -> str:
    """FFmpeg's own words for an error, with the last line it logged."""
    said = error.log[2].strip() if error.log else ""
    return f"{error.strerror} ({said})" if said else str(error.strerror)


def resolve_span(start: float | None, end: float | None, duration: float | None) -> Span | None:
    """The (start, end) in seconds to cut from a file of this duration, or None to take it whole.

    A file is evidently already trimmed, and taken whole, where the span starts at or after its end, or where it lasts
    at most TRIM_MARGIN_S longer than the span. Half a span means from the file's start or to its end.
    Raises VideoError("empty_span") for a span that is negative, empty or not a number.
    """
    if start is None and end is None:
        return None
    begin = 0.0 if start is None else start
    if not 0 <= begin < (math.inf if end is None else end):
        raise VideoError("empty_span", f"the span {start} s to {end} s holds no time; give 0 <= start < end")
    if duration is None:
        return Span(begin, end)
    trimmed = begin >= duration or (end is not None and duration <= end - begin + TRIM_MARGIN_S)
    return None if trimmed else Span(begin, end)


def count_slots(span: Span | None, fps: Fraction) -> int | None:
    """Frames in a span at this rate, at least one; None where only the file's end limits them."""
    return None if span is None or span.end is None else max(1, round_half_up(Fraction(span.end - span.start) * fps))


def resample(
    timed: Iterable[tuple[Fraction, Fraction, T]], *, fps: Fraction, slots: int | None
) -> Iterator[tuple[T, int]]:
    """(frame, how many output slots it fills) from (time, end time, frame) in rising order of time, in seconds.

    Exactly FFmpeg's `fps=…:round=near`: a frame goes to slot round(time × fps), an empty slot repeats the frame before,
    of frames that share a slot the last stays, and the last frame lasts to its end. Differs in two edges: a video has
    at least one slot, and `slots`, where given, ends the output there. Frames that end before time 0 fill nothing.
    """
    held: list[T] = []
    filled, last_end = 0, Fraction(0)
    for time, end, frame in timed:
        slot = round_half_up(time * fps)
        last = slot if slots is None else min(slot, slots)
        if held and last > filled:
            yield held[0], last - filled
            filled = last
        if slots is not None and slot >= slots:
            return
        held, last_end = [frame], end
    end_slot = max(1, round_half_up(last_end * fps))
    if slots is not None:
        end_slot = min(end_slot, slots)
    if last_end > 0 and end_slot > filled:
        yield held[0], end_slot - filled


def rises(path: str | os.PathLike[str], probe: Probe) -> bool:
    """Whether the decoder puts out a video's first frames in the order of their presentation times."""
    with open_video(path) as (container, stream):
        if not stream.codec_context.has_b_frames:
            return True
        source = _Source(container, stream, None, probe)
        times = [frame.pts for frame in islice(source.frames(lambda: None), PROBED_FRAMES) if frame.pts is not None]
    return all(before < after for before, after in pairwise(times))


def check_probe(probe: Probe, span: Span | None, settings: DecodeSettings) -> None:
    """Raise VideoError for a video not worth decoding: nothing in it, cut off, or longer than the limit."""
    if probe.packets == 0 and span is not None:
        raise VideoError("empty_span", f"the file holds no picture from {span.start:g} s on")
    if probe.packets == 0 and probe.declared:
        raise VideoError("truncated", f"the header promises {probe.declared:g} s, but the file holds no picture")
    if probe.packets == 0:
        raise VideoError("no_frames", "the file holds a video stream without any picture")
    if probe.share < MIN_DECODED_SHARE:
        raise VideoError(
            "truncated", f"the file is cut off: only {probe.share:.0%} of the duration in its header is there"
        )
    seconds = float(probe.seconds)
    if span is not None:
        seconds = min(seconds, (math.inf if span.end is None else span.end) - span.start)
    if seconds * settings.fps > settings.max_frames + 0.5:
        raise too_long(settings, f"{seconds:.0f} s")


def too_long(settings: DecodeSettings, length: str) -> VideoError:
    return VideoError(
        "too_long",
        f"the video is too long ({length}; the limit is {settings.max_frames} frames at {settings.fps:g} frames/s): "
        "give the span to cut, or raise max_frames",
    )


class _Source:
    """The decoded frames of one open video in order of display with their times, and the count of what was lost."""

    def __init__(self, container: InputContainer, stream: VideoStream, span: Span | None, probe: Probe) -> None:
        self.container, self.stream, self.span, self.probe = container, stream, span, probe
        self.decoded = self.lost = self.corrupt = 0
        self.finished = False  # the file was read to its end, not only to the end of the span
        self.origin = Fraction(0)

    def timed_frames(self, on_progress: Callable[[], None]) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
        """(time, end time, frame), in seconds from the span's start or from the first frame, times rising."""
        frame_s, by_time = 1 / nominal_rate(self.stream), self.probe.timing == "time"
        first = None if self.span is None else Fraction(self.span.start)
        previous: Fraction | None = None
        for index, frame in enumerate(self.frames(on_progress)):
            time = frame_time(frame, self.stream) if by_time else self.origin + (index + self.lost) * frame_s
            if time is None or (previous is not None and time <= previous):
                self.corrupt += 1
                continue
            previous, first = time, time if first is None else first
            seconds = (frame.duration or 0) * tick(self.stream) if by_time else frame_s
            yield time - first, time - first + min(seconds or frame_s, Fraction(MAX_GAP_S)), frame
        self.finished = True

    def frames(self, on_progress: Callable[[], None]) -> Iterator[VideoFrame]:
        """Decode packet by packet; one that cannot be decoded is counted and passed over."""
        if self.span is not None and self.probe.seekable:
            seek(self.container, self.stream, self.span.start)
        first = True
        for packet in read_packets(self.container, on_progress):
            if packet.stream_index != self.stream.index:
                continue
            if first and self.probe.seekable:
                self.origin = (packet_time(packet) or Fraction(0)) - time_zero(self.stream)
            first = False
            yield from self.decode_packet(packet)
        yield from self.decode_packet(None)

    def decode_packet(self, packet: Packet | None) -> Iterator[VideoFrame]:
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            self.lost += 1
            return
        for frame in frames:
            self.decoded += 1
            self.corrupt += frame.is_corrupt
            yield frame

    def damaged(self) -> int:
        """Frames lost or decoded with errors; a loss without any error shows once the whole file was read."""
        if self.finished and self.span is None:
            self.lost = max(self.lost, self.probe.pictures - self.decoded)
        return self.lost + self.corrupt

    def share(self) -> float:
        """Part of the frames that the file should hold that decoded without error."""
        damaged = self.damaged()
        return self.probe.share * (1 - damaged / max(1, self.decoded + self.lost))

    def check(self) -> None:
        """Raise VideoError where too little decoded."""
        damaged, count = self.damaged(), self.decoded + self.lost
        if count == 0:
            raise VideoError("no_frames", "the decoder yields no frame and reports no error")
        if self.share() < MIN_DECODED_SHARE:
            kind: Kind = "truncated" if self.probe.share < 1 - damaged / count else "corrupt"
            reach = "" if self.probe.share == 1 else f", and the file is cut off at {self.probe.share:.0%}"
            raise VideoError(kind, f"{damaged} of {count} frames are lost or decode with errors{reach}")

    def info(self, scaler: Scaler, *, frames: int, duration: float) -> VideoInfo:
        height, width = scaler.size
        return VideoInfo(
            codec=self.stream.codec_context.name,
            pixel_format=scaler.pixel_format,
            source_height=scaler.source_size[0],
            source_width=scaler.source_size[1],
            source_fps=float(nominal_rate(self.stream)),
            rotation=scaler.first_orientation.rotation,
            timing=self.probe.timing,
            trimmed=self.span is not None,
            duration=duration,
            source_frames=self.decoded,
            damaged_frames=self.damaged(),
            partial=self.share() < WHOLE_SHARE,
            frames=frames,
            height=height,
            width=width,
        )


def frame_time(frame: VideoFrame, stream: VideoStream) -> Fraction | None:
    """Seconds at which a frame is shown, 0 where a player shows 0:00; None where the decoder does not say."""
    return None if frame.pts is None else frame.pts * tick(stream) - time_zero(stream)
