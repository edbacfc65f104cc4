"""A video file → RGB frames at a fixed rate or at its own, resized, rotation applied.

Everything here runs in the calling process and trusts FFmpeg not to crash. Real collections hold files on which it
does: `pipelines.media.decoder_process.Decoder` runs `decode` in a child process and is what the pipelines use.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, pairwise
from typing import Annotated, Generic, Literal, TypeVar

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from tyro.conf import arg

from pipelines.errors import Kind, SettingsError, VideoError
from pipelines.formatting import format_count
from pipelines.media.probe import (
    Probe,
    Span,
    duration_of,
    find_offset,
    format_name,
    holds_picture,
    open_video,
    precedes,
    probe_packets,
    read_packets,
)
from pipelines.media.resize import MAX_ASPECT_RATIO, RGBFrame, Scaler, output_size, round_half_up
from pipelines.media.timestamps import Timing, nominal_rate, stream_start, tick, time_zero

T = TypeVar("T")
FrameRate = float | Literal["native"]

MIN_DECODED_SHARE = 0.9
PROBED_FRAMES = 16
TRIM_MARGIN_S = 1.0
EDGE_S = 0.0005  # spans are decimals and containers round: what shows for less of a span is not in it
PACKETS_OF_A_PICTURE = 2  # at most: one for each field
LAST_FRAME_S = Fraction(10)  # at most, where the file does not say how long it lasts
MIN_FPS, MAX_FPS = 0.01, 1000
MAX_SHORT_SIDE = 2048  # px; with MAX_ASPECT_RATIO the most that H.264 encoders take
MAX_SIDE = 16_384  # px, of a frame at its own size: more than any video codec's profile allows
DAY_S = 86_400
MAX_LIMIT = 1 << 30  # seconds or MiB: more than any machine has, and still a number that the kernel takes
WHOLE_SHARE = 0.99  # headers are off by a little: below this share of its frames a video counts as partial


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How videos become frames, and what a decoder may cost before it is stopped."""

    fps: FrameRate = 25.0
    """Frames per second that videos are sampled at. native: each picture of a file once, at the rate that it has."""
    short_side: int = 256
    """Shorter side of the frames in pixels; an even number."""
    frame_size: str | None = None
    """WIDTHxHEIGHT of the frames in pixels, such as 340x256, whatever shape a video has. None: by --short-side."""
    max_frames: int = 15_000
    """A video or span with more frames goes to quarantine (15,000 are 10 minutes at 25 fps)."""
    max_gap_s: Annotated[float, arg(name="max-gap")] = 300.0
    """A video with a longer pause between two frames, in seconds, goes to quarantine; repeats fill a shorter one.
    At the videos' own rate nothing is filled, and pauses have no limit."""
    timeout_s: Annotated[float, arg(name="decode-timeout")] = 60.0
    """Seconds without a sign of life after which a decoder counts as hung."""
    memory_limit_mb: Annotated[int | None, arg(name="decode-memory")] = 3072
    """Address space of the decoder process in MiB. None: no limit."""
    cpu_limit_s: Annotated[int | None, arg(name="decode-cpu-limit")] = 3600
    """Processor seconds that one video may take. None: no limit."""

    def __post_init__(self) -> None:
        if self.fps != "native" and not (isinstance(self.fps, float | int) and MIN_FPS <= self.fps <= MAX_FPS):
            raise SettingsError(f"--fps is {self.fps}: give {MIN_FPS:g} to {MAX_FPS} frames per second, or native")
        if not 2 <= self.short_side <= MAX_SHORT_SIDE or self.short_side % 2:
            raise SettingsError(f"--short-side is {self.short_side}: give an even number, 2 to {MAX_SHORT_SIDE} pixels")
        if self.frame_size not in (None, "native"):
            self._check_frame_size()
        if self.max_frames < 1:
            raise SettingsError(f"--max-frames is {self.max_frames}: give at least 1")
        for flag, seconds in (("--max-gap", self.max_gap_s), ("--decode-timeout", self.timeout_s)):
            if not 0 < seconds <= DAY_S:
                raise SettingsError(f"{flag} is {seconds}: give seconds above 0, at most {DAY_S}")
        limits = (("--decode-cpu-limit", self.cpu_limit_s, 1), ("--decode-memory", self.memory_limit_mb, 512))
        for flag, limit, least in limits:
            if limit is not None and not least <= limit <= MAX_LIMIT:
                raise SettingsError(f"{flag} is {limit}: give {least} to {MAX_LIMIT:,}, or None for no limit")

    def _check_frame_size(self) -> None:
        height, width = self.exact_size or (0, 0)
        small, large = sorted((height, width))
        if not 2 <= small <= large <= MAX_SHORT_SIDE or height % 2 or width % 2 or large > MAX_ASPECT_RATIO * small:
            raise SettingsError(
                f"--frame-size is {self.frame_size}: give WIDTHxHEIGHT, two even numbers of 2 to {MAX_SHORT_SIDE} "
                f"pixels of which one is at most {MAX_ASPECT_RATIO} times the other"
            )

    @property
    def exact_size(self) -> tuple[int, int] | None:
        """(height, width) of all frames in pixels, where `frame_size` says it."""
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", self.frame_size or "", re.ASCII)
        return (int(found[2]), int(found[1])) if found else None

    @property
    def longest_side(self) -> int:
        """Pixels that neither side of a frame can exceed."""
        if self.frame_size == "native":
            return MAX_SIDE
        return max(self.exact_size or (self.short_side * MAX_ASPECT_RATIO,))

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the frames of a video of this size. Raises VideoError("bad_shape").

        `frame_size` may be "native", too, which keeps a video's own size, even or odd; shards hold none of these.
        """
        if self.frame_size == "native":
            return height, width
        return self.exact_size or output_size(height, width, self.short_side)


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the source was and how well it decoded; complete only after the last frame."""

    codec: str
    pixel_format: str
    source_height: int  # px, as stored, before rotation
    source_width: int
    source_fps: float  # pictures a second that the file, or what was read of it for the span, really holds
    rotation: int  # degrees counterclockwise that were applied: 0, 90, 180, 270
    fps: float  # frames a second that were yielded: the settings', or the file's own where these say "native"
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
    on_rate: Callable[[float], None] = lambda fps: None,
) -> Generator[RGBFrame, None, VideoInfo]:
    """Yield the (H,W,3) uint8 RGB frames of a local video one by one; the generator's return value is its VideoInfo.

    One thread, memory independent of the video's length. `start` and `end` (seconds) cut an untrimmed file, see
    `resolve_span`. Resizing is one bilinear swscale step from the source's pixel format (its support grows when it
    shrinks, so it does not alias), bit-exact on every CPU. Colours follow the stream's matrix and range tags (BT.601,
    limited range where it has none); HDR is not tone-mapped, transparency is dropped, fields are not separated.
    At `fps="native"` each decoded picture that a player shows within the span comes once.
    Raises VideoError, possibly after some frames: a file is kept, and flagged partial, if at least MIN_DECODED_SHARE of
    its frames are there and decode without error. `on_progress` is called for every packet, `on_rate` once before the
    first frame with the frames a second to expect; a file's own rate is known for certain only at the end.
    """
    fps = None if settings.fps == "native" else Fraction(settings.fps).limit_denominator(1001)
    with explain_errors():
        span, probe = probe_file(path, start, end, on_progress)
        check_probe(probe, span, settings)
        with open_video(path, probe.stream) as (container, stream):
            source, count = _Source(container, stream, span, probe), 0
            scaler = Scaler(settings.size_of)
            timed = source.timed_frames(on_progress)
            once = EachOnce(timed, span)
            on_rate(source.mean_rate() if fps is None else float(fps))
            for frame, repeats in once if fps is None else resample(timed, fps=fps, slots=count_slots(span, fps)):
                count += repeats
                if count > settings.max_frames:
                    raise too_long(settings, f"over {format_count(settings.max_frames, 'frame')}")
                picture = scaler.convert(frame)
                for _ in range(repeats):
                    yield picture
            source.check()
            if count == 0:
                raise VideoError("empty_span", f"the video ends before the span, which starts at {start} s")
            own = once.rate() or source.mean_rate()
            rate = own if settings.fps == "native" else settings.fps
            seconds = count / own if fps is None else float(count / fps)
            return source.info(scaler, frames=count, fps=rate, source_fps=own, duration=seconds)


def probe_file(
    path: str | os.PathLike[str], start: float | None, end: float | None, on_progress: Callable[[], None]
) -> tuple[Span | None, Probe]:
    """What is to be cut out of a file, and what its packets say of it. Raises VideoError."""
    with open_video(path) as (container, stream):
        index, span, offset = stream.index, resolve_span(start, end, duration_of(container)), None
        if span is None:
            probe = probe_packets(container, stream, span, offset, on_progress)
        else:
            offset = find_offset(container, stream, span.start)
    if span is not None:  # from the start again: looking for the offset moved the container on
        with open_video(path, index) as (container, stream):
            probe = probe_packets(container, stream, span, offset, on_progress)
    if probe.timing == "time" and not rises(path, probe):
        probe = replace(probe, timing="order", offset=None)
    return span, probe


@contextmanager
def explain_errors() -> Iterator[None]:
    """Turn what PyAV raises into VideoError."""
    try:
        yield
    except MemoryError as error:
        raise VideoError("out_of_memory", "decoding needs more memory than there is (--decode-memory)") from error
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
    waiting: list[T] = []
    filled, last_end = 0, Fraction(0)
    for time, end, frame in timed:
        slot = round_half_up(time * fps)
        last = slot if slots is None else min(slot, slots)
        if waiting and last > filled:
            yield waiting[0], last - filled
            filled = last
        if slots is not None and slot >= slots:
            return
        waiting, last_end = [frame], end
    end_slot = max(1, round_half_up(last_end * fps))
    if slots is not None:
        end_slot = min(end_slot, slots)
    if last_end > 0 and end_slot > filled:
        yield waiting[0], end_slot - filled


class EachOnce(Generic[T]):
    """What `resample` takes and gives, but every frame that is shown within the span fills one slot."""

    def __init__(self, timed: Iterable[tuple[Fraction, Fraction, T]], span: Span | None) -> None:
        self.timed = timed
        self.length = math.inf if span is None or span.end is None else span.end - span.start
        self.edge = 0 if span is None else min(EDGE_S, self.length / 2)
        self.times: list[Fraction] = []  # of the first frame and of the last one
        self.end = Fraction(0)  # of the last one
        self.count = 0

    def __iter__(self) -> Iterator[tuple[T, int]]:
        for time, end, frame in self.timed:
            if time >= self.length - self.edge:
                return
            if end > self.edge:
                self.times, self.end = [*self.times[:1], time], end
                self.count += 1
                yield frame, 1

    def rate(self) -> float | None:
        """Frames a second from the first frame to the last, or while a single one shows; None where no time passes."""
        if not self.times:
            return None
        first, last = self.times[0], self.times[-1]
        if self.count == 1:
            return float(1 / (self.end - first)) if self.end > first else None
        return float((self.count - 1) / (last - first)) if last > first else None


def rises(path: str | os.PathLike[str], probe: Probe) -> bool:
    """Whether the decoder puts out a video's first frames in the order of their presentation times."""
    with open_video(path, probe.stream) as (container, stream):
        if not stream.codec_context.has_b_frames:
            return True
        source = _Source(container, stream, None, replace(probe, offset=None, lead_in=0, first_pts=None))
        times = [frame.pts for frame in islice(source.frames(lambda: None), PROBED_FRAMES) if frame.pts is not None]
    return all(before <= after for before, after in pairwise(times))


def check_probe(probe: Probe, span: Span | None, settings: DecodeSettings) -> None:
    """Raise VideoError for a video not worth decoding: nothing in it, cut off, or longer than the limit."""
    if probe.packets == 0 and span is not None:
        until = "on" if span.end is None else f"to {span.end:g} s"
        raise VideoError("empty_span", f"the file holds no picture from {span.start:g} s {until}")
    if probe.packets == 0 and probe.declared:
        raise VideoError("truncated", f"the header promises {probe.declared:g} s, but the file holds no picture")
    if probe.packets == 0:
        raise VideoError("no_frames", "the file holds a video stream without any picture")
    if probe.share < MIN_DECODED_SHARE:
        raise VideoError(
            "truncated", f"the file is cut off: only {probe.share:.0%} of the duration in its header is there"
        )
    if settings.fps == "native":
        if probe.pictures > PACKETS_OF_A_PICTURE * settings.max_frames and span is None:
            raise too_long(settings, f"{probe.pictures} pictures")
        return
    if probe.longest_gap > settings.max_gap_s:
        raise VideoError(
            "long_gap",
            f"between two frames lie {probe.longest_gap:.0f} s, which would be filled with repeats; the limit is "
            f"--max-gap {settings.max_gap_s:g}: cut the file there, or raise it",
        )
    seconds = float(probe.seconds)
    if span is not None:
        seconds = min(seconds, (math.inf if span.end is None else span.end) - span.start)
    if seconds * settings.fps > settings.max_frames + 0.5:
        raise too_long(settings, f"{seconds:.0f} s")


def too_long(settings: DecodeSettings, length: str) -> VideoError:
    rate = "" if settings.fps == "native" else f" at {settings.fps:g} frames/s"
    return VideoError(
        "too_long",
        f"the video is too long ({length}; the limit is {format_count(settings.max_frames, 'frame')}{rate}): "
        "give the span to cut, or raise --max-frames",
    )


class _Source:
    """The decoded frames of one open video in order of display with their times, and the count of what was lost."""

    def __init__(self, container: InputContainer, stream: VideoStream, span: Span | None, probe: Probe) -> None:
        self.container, self.stream, self.span, self.probe = container, stream, span, probe
        self.decoded = self.interlaced = self.lost = self.corrupt = 0
        self.repeats = 0  # frames of an AVI that are not stored, because they equal the one before
        self.waiting: list[int | None] = []  # stamps of the pictures fed before the first frame came out
        self.undecodable = 0  # of these, the ones shown before that frame, in a recording that begins in the midst
        self.finished = False  # the file was read to its end, not only to the end of the span
        self.zero = time_zero(container, stream)
        self.frame_s = 1 / nominal_rate(stream)
        self.next_number: int | None = None  # of an AVI, whose packets are numbered: what the next one should have

    def timed_frames(self, on_progress: Callable[[], None]) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
        """(time, end time, frame), in seconds from the span's start or from the first frame, times never falling."""
        first = None if self.span is None else Fraction(self.span.start)
        previous: Fraction | None = None
        for index, frame in enumerate(self.frames(on_progress)):
            time = self.frame_time(frame, index)
            if time is None or (previous is not None and time < previous):
                self.corrupt += 1
                continue
            before, previous, first = previous, time, time if first is None else first
            yield time - first, self.end_of(frame, time, before) - first, frame
        self.finished = True

    def frame_time(self, frame: VideoFrame, index: int) -> Fraction | None:
        """Seconds at which a player shows the frame, the `index`-th that was decoded; None where nothing says."""
        if self.probe.timing == "time":
            return None if frame.pts is None else frame.pts * tick(self.stream) - self.zero
        start = max(Fraction(0), stream_start(self.stream) - self.zero) if self.span is not None else Fraction(0)
        return start + (index + self.lost + self.repeats) * self.frame_s

    def end_of(self, frame: VideoFrame, time: Fraction, before: Fraction | None) -> Fraction:
        """Seconds up to which a frame is shown if it is the last: as long as it says, or as the one before it was."""
        if self.probe.timing == "order":
            return time + self.frame_s
        seconds = (frame.duration or 0) * tick(self.stream) or (time - before if before is not None else self.frame_s)
        length = self.file_end()
        limit = time + LAST_FRAME_S if length is None else max(length, time + self.frame_s)
        return min(time + (seconds or self.frame_s), limit)

    def file_end(self) -> Fraction | None:
        """Seconds at which a player shows the last of the stream, as the header has it; None where it does not say."""
        if self.stream.duration is not None and format_name(self.container) == "mov":
            return stream_start(self.stream) + self.stream.duration * tick(self.stream) - self.zero
        return None if self.container.duration is None else Fraction(self.container.duration, av.time_base)

    def frames(self, on_progress: Callable[[], None]) -> Iterator[VideoFrame]:
        """Decode packet by packet; one that cannot be decoded is counted and passed over."""
        if self.probe.offset is not None:
            self.container.seek(self.probe.offset, stream=self.stream, backward=True)
        lead_in = self.probe.lead_in
        for packet in read_packets(self.container, self.stream, on_progress):
            if packet.stream_index != self.stream.index:
                continue
            if lead_in > 0:
                lead_in -= 1
                continue
            self.count_repeats(packet)
            yield from self.decode_packet(packet)
        yield from self.decode_packet(None)

    def count_repeats(self, packet: Packet) -> None:
        """Keep an AVI's frames in time: its packets are numbered, and a number that is left out is a repeat."""
        if format_name(self.container) != "avi" or packet.dts is None:
            return
        number = round(packet.dts * tick(self.stream) / self.frame_s)
        if self.next_number is None:
            self.next_number = number if self.probe.offset is None else 0
        self.repeats += max(0, number - self.next_number)
        self.next_number = number + 1

    def decode_packet(self, packet: Packet | None) -> Iterator[VideoFrame]:
        before_start = packet is not None and precedes(packet.pts, self.probe.first_pts)
        if self.decoded == 0 and packet is not None:
            self.waiting.append(packet.pts)
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            self.lost += not before_start
            return
        if frames and self.decoded == 0 and self.probe.lead_in:
            self.undecodable = sum(precedes(pts, frames[0].pts) for pts in self.waiting)
            self.lost = max(0, self.lost - self.undecodable)
        if not frames and packet is not None and self.is_placeholder(packet):
            self.repeats += 1
        for frame in frames:
            if frame.is_corrupt and precedes(frame.pts, self.probe.first_pts):
                continue  # it refers to what was cut off; a player would not show it either
            self.decoded += 1
            self.interlaced += frame.interlaced_frame
            self.corrupt += frame.is_corrupt
            yield frame

    def is_placeholder(self, packet: Packet) -> bool:
        """Whether an AVI's packet stands for a repeat of the picture before."""
        avi = format_name(self.container) == "avi"
        return avi and not holds_picture(packet, self.stream.codec_context.name)

    def damaged(self) -> int:
        """Frames lost or decoded with errors; a loss without any error shows once the whole file was read."""
        if self.finished and self.span is None:
            # The two fields of an interlaced frame may be a packet each.
            self.lost = max(self.lost, self.probe.pictures - self.undecodable - self.decoded - self.interlaced)
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

    def mean_rate(self) -> float:
        """Pictures a second from the first to the last: the header's claim may be anything."""
        between = self.probe.seconds - self.frame_s
        return float((self.probe.packets - 1) / between if between > 0 else 1 / self.frame_s)

    def info(self, scaler: Scaler, *, frames: int, fps: float, source_fps: float, duration: float) -> VideoInfo:
        height, width = scaler.size
        return VideoInfo(
            codec=self.stream.codec_context.name,
            pixel_format=scaler.pixel_format,
            source_height=scaler.source_size[0],
            source_width=scaler.source_size[1],
            source_fps=source_fps,
            rotation=scaler.first_orientation.rotation,
            fps=fps,
            timing=self.probe.timing,
            trimmed=self.span is not None,
            duration=duration,
            source_frames=self.decoded,
            damaged_frames=self.damaged(),
            partial=self.share() < WHOLE_SHARE or self.probe.lead_in > (1 - WHOLE_SHARE) * self.probe.packets,
            frames=frames,
            height=height,
            width=width,
        )
