"""A video file → RGB frames at a fixed rate, shorter side resized, rotation applied.

Everything here runs in the calling process and trusts FFmpeg not to crash. Real collections hold files on which it
does: `pipelines.decoder_process.Decoder` runs `decode` in a child process and is what the pipelines use.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

RGBFrame = NDArray[np.uint8]  # (H,W,3)
T = TypeVar("T")

Timing = Literal["time", "order"]
Kind = Literal[
    "bad_shape",
    "corrupt",
    "decoder_crashed",
    "decoder_hung",
    "empty_span",
    "encrypted",
    "no_frames",
    "no_video_stream",
    "out_of_memory",
    "too_long",
    "too_slow",
    "truncated",
    "unreadable",
]
KINDS: tuple[str, ...] = get_args(Kind)

MAX_ASPECT_RATIO = 8
MIN_DECODED_SHARE = 0.9
MAX_GAP_S = 10.0
PROBED_FRAMES = 16
TRIM_MARGIN_S = 1.0
WHOLE_SHARE = 0.99  # headers are off by a little: below this share of its frames a video counts as partial
INDEXED = ("mov", "matroska", "avi")  # elsewhere FFmpeg guesses positions and may land behind the span
SCALING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

# Playlists (hls, concat, dash), image sequences, devices and lavfi are left out: they open other files and URLs.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,flv,asf,ogg,rm,mxf,"
    "mjpeg,apng,nut,dv,h261,h263,vc1,nsv,yuv4mpegpipe,wtv,webp,mp3,aac,flac,wav,amr,aiff,ac3"
)
DECLARES_DURATION = (
    "mov",
    "matroska",
    "avi",
    "flv",
    "asf",
)  # elsewhere FFmpeg estimates it, at times from the bit rate


class Span(NamedTuple):
    """Part of a file to cut out, in seconds; no end = to the end of the file."""

    start: float
    end: float | None


class VideoError(Exception):
    """A video that yields no usable frames; `kind` is a stable word for tables, `message` a sentence for people."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(kind, message)
        self.kind: Kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How videos become frames, and what a decoder may cost before it is stopped."""

    fps: float = 25.0  # frames a second
    short_side: int = 256  # px, even
    max_frames: int = 15_000  # a longer video or span is refused (15,000 frames are 10 minutes at 25 fps)
    timeout_s: float = 60.0  # seconds without a sign of life after which the decoder counts as hung
    memory_limit_mb: int | None = 3072  # address space of the decoder process, MiB; None = unlimited
    cpu_limit_s: int | None = 3600  # processor seconds that one video may take; None = unlimited

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}; give frames a second above 0 and up to 1000")
        if self.short_side < 2 or self.short_side % 2:
            raise ValueError(f"short_side is {self.short_side}; give an even number of pixels, at least 2")
        if self.max_frames < 1:
            raise ValueError(f"max_frames is {self.max_frames}; give at least 1")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; give seconds above 0")
        if self.cpu_limit_s is not None and self.cpu_limit_s < 1:
            raise ValueError(f"cpu_limit_s is {self.cpu_limit_s}; give at least 1, None for no limit")
        if self.memory_limit_mb is not None and self.memory_limit_mb < 512:
            raise ValueError(f"memory_limit_mb is {self.memory_limit_mb}; FFmpeg needs at least 512, None for no limit")


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


def output_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side `short_side` and the longer rounded to an even number.

    Pixels count as square: a sample aspect ratio is ignored, as in every published Kinetics pipeline.
    Raises VideoError("bad_shape") where the longer side is over MAX_ASPECT_RATIO times the shorter one.
    """
    if min(height, width) < 1:
        raise VideoError("bad_shape", f"the picture is {width}×{height} pixels: nothing to see")
    ratio = Fraction(max(height, width), min(height, width))
    if ratio > MAX_ASPECT_RATIO:
        raise VideoError(
            "bad_shape",
            f"the picture is {width}×{height}: one side is over {MAX_ASPECT_RATIO} times the other; crop it first",
        )
    long_side = 2 * round_half_up(ratio * short_side / 2)
    return (short_side, long_side) if height <= width else (long_side, short_side)


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


def round_half_up(value: Fraction) -> int:
    """Nearest integer, halves upward: FFmpeg's `round=near` for the times at hand, which are not negative."""
    return math.floor(value + Fraction(1, 2))


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


@dataclass(frozen=True)
class Survey:
    """What the packets say, without decoding any."""

    packets: int  # of the video stream, in the file or in the span
    pictures: int  # of these, the ones that must become a frame
    timing: Timing
    seconds: Fraction  # from the first picture to the last
    declared: float | None  # seconds that the header promises, where it is known to know and the whole file was read
    share: float  # part of these that the packets reach, at most 1
    seekable: bool  # the container finds the keyframe before the span


def judge_timing(pts: list[int | None], *, container: str, time_base: Fraction, rate: Fraction) -> Timing:
    """Whether presentation times place frames ("time") or the order of decoding does ("order").

    Times are trusted where all of this holds: the container is not AVI, which stores none (what FFmpeg makes up for it
    is out of order on UCF-101, HMDB-51, NTU and UT-Interaction clips whose frames decode in the right order); every
    packet has one; no two are equal; no gap between neighbours is over MAX_GAP_S seconds or ten nominal frames; and the
    decoder puts out the first PROBED_FRAMES frames with rising times (`rises`; not so where an AVI was copied into
    another container). Otherwise frame i of the decoder's output order is shown at i / nominal rate.
    """
    times = [t for t in pts if t is not None]
    if container == "avi" or len(times) < len(pts) or not times:
        return "order"
    gaps = np.diff(np.sort(np.array(times, np.int64)))
    if gaps.size == 0:
        return "time"
    longest = max(MAX_GAP_S, float(10 / rate)) / float(time_base)
    return "time" if gaps.min() > 0 and gaps.max() <= longest else "order"


def count_slots(span: Span | None, fps: Fraction) -> int | None:
    """Frames in a span at this rate, at least one; None where only the file's end limits them."""
    return None if span is None or span.end is None else max(1, round_half_up(Fraction(span.end - span.start) * fps))


def rises(path: str | os.PathLike[str], survey: Survey) -> bool:
    """Whether the decoder puts out a video's first frames in the order of their presentation times."""
    with open_video(path) as (container, stream):
        if not stream.codec_context.has_b_frames:
            return True
        source = _Source(container, stream, None, survey)
        times = [frame.pts for frame in islice(source.frames(lambda: None), PROBED_FRAMES) if frame.pts is not None]
    return all(before < after for before, after in pairwise(times))


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
            survey = survey_packets(container, stream, span, on_progress)
        check_survey(survey, span, settings)
        if survey.timing == "time" and not rises(path, survey):
            survey = replace(survey, timing="order", seekable=False)
        with open_video(path) as (container, stream):
            source, scaler, count = _Source(container, stream, span, survey), _Scaler(settings.short_side), 0
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


@contextmanager
def open_video(path: str | os.PathLike[str]) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A local file and its main video stream, with FFmpeg kept from opening anything else. Raises VideoError."""
    file = Path(path).absolute()
    if not file.is_file():
        raise VideoError("unreadable", "not a regular file" if file.exists() else "there is no such file")
    if file.stat().st_size == 0:
        raise VideoError("unreadable", "the file is empty (0 bytes)")
    limits = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    with av.open(f"file:{file}", container_options=limits, metadata_errors="replace") as container:
        stream = pick_stream(container)
        stream.codec_context.thread_count = 1
        yield container, stream


def pick_stream(container: InputContainer) -> VideoStream:
    """The video stream with the most pixels, the first of equals, cover pictures aside. Raises VideoError."""
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        others = sorted({s.type for s in container.streams} - {"video"})
        cover = " and a cover picture" if container.streams.video else ""
        raise VideoError("no_video_stream", f"no video stream, only {', '.join(others) or 'nothing at all'}{cover}")
    known = [s for s in videos if s.codec_context is not None]
    if not known:
        raise VideoError("unreadable", "this build of FFmpeg has no decoder for the video stream")
    return max(known, key=lambda s: s.codec_context.width * s.codec_context.height)


def duration_of(container: InputContainer) -> float | None:
    """Seconds the container says it lasts, None where it does not say."""
    return None if container.duration is None else container.duration / av.time_base


def promised_duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds that a complete file would last, None where its kind does not tell without being read to the end."""
    name, duration = format_name(container), duration_of(container)
    if name not in DECLARES_DURATION:
        return None
    # FFmpeg shortens an AVI's duration to what is there of it, but keeps the header's count.
    return max(duration or 0, float(stream.frames * tick(stream))) if name == "avi" else duration


def nominal_rate(stream: VideoStream) -> Fraction:
    """Frames a second the stream claims; 25 where it claims nothing believable."""
    rate = stream.guessed_rate or stream.average_rate
    return Fraction(25) if rate is None or not 0 < rate <= 1000 else rate


def tick(stream: VideoStream) -> Fraction:
    """Seconds in one unit of the stream's timestamps."""
    assert stream.time_base is not None  # only an encoder's stream may lack it
    return stream.time_base


def time_zero(stream: VideoStream) -> Fraction:
    """Seconds on the stream's clock at which a player shows 0:00."""
    return (stream.start_time or 0) * tick(stream)


def format_name(container: InputContainer) -> str:
    """FFmpeg's name of the container, the first of its aliases: "mov", "matroska", "avi"…"""
    return container.format.name.split(",")[0]


def seek(container: InputContainer, stream: VideoStream, start: float) -> None:
    """Move to the keyframe at or before `start` seconds; stay at the file's start where it has no index to find it."""
    if format_name(container) not in INDEXED:
        return
    with suppress(av.error.FFmpegError):
        offset = (Fraction(start) + time_zero(stream)) / tick(stream)
        container.seek(math.floor(offset), stream=stream, backward=True)


def read_packets(container: InputContainer, on_progress: Callable[[], None]) -> Iterator[Packet]:
    """The packets of all streams in file order, up to the end or to where the file cannot be read on."""
    packets = container.demux()
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.MemoryError:
            raise
        except (av.error.FFmpegError, IndexError):  # IndexError: PyAV's end of a file in whose midst a stream appeared
            return
        on_progress()
        if packet.size:
            yield packet


def holds_picture(packet: Packet, codec: str) -> bool:
    """Whether a packet must become a frame: VP8 hides some, and MPEG-4 in AVI stands empty ones in for repeats."""
    if codec == "vp8":
        return bool(bytes(packet)[0] & 0x10)
    return codec != "mpeg4" or packet.size > 8


def survey_packets(
    container: InputContainer, stream: VideoStream, span: Span | None, on_progress: Callable[[], None]
) -> Survey:
    """Read the packets, of the span or of the whole file, without decoding. Raises VideoError("encrypted")."""
    zero, codec = time_zero(stream), stream.codec_context.name
    pts: list[int | None] = []
    pictures, reach, landed = 0, Fraction(0), None
    if span is not None:
        seek(container, stream, span.start)
    for packet in read_packets(container, on_progress):
        time = packet_time(packet)
        reach = max(reach, packet_end(packet))
        if packet.stream_index != stream.index or packet.is_discard:
            continue
        if packet.has_sidedata("encryption_info"):
            raise VideoError("encrypted", "the video stream is encrypted (DRM); decrypt it first")
        landed = time if landed is None else landed
        pts.append(packet.pts)
        pictures += holds_picture(packet, codec)
        if span is not None and span.end is not None and time is not None and time - zero > span.end:
            break
    name = format_name(container)
    timing = judge_timing(pts, container=name, time_base=tick(stream), rate=nominal_rate(stream))
    declared = promised_duration(container, stream) if span is None else None
    return Survey(
        packets=len(pts),
        pictures=pictures,
        timing=timing,
        seconds=length_of(pts, timing, stream),
        declared=declared,
        share=min(1.0, float(reach) / declared) if declared else 1.0,
        seekable=span is not None
        and landed is not None
        and landed - zero <= span.start
        and (timing == "time" or name == "avi"),
    )


def packet_time(packet: Packet) -> Fraction | None:
    """Seconds at which a packet is decoded, or else shown; None where it has neither stamp."""
    stamp = packet.pts if packet.dts is None else packet.dts
    return None if stamp is None else stamp * packet.time_base


def packet_end(packet: Packet) -> Fraction:
    """Seconds up to which a packet is shown or heard; 0 where it has no stamp."""
    stamps = [stamp for stamp in (packet.pts, packet.dts) if stamp is not None]
    return (max(stamps) + (packet.duration or 0)) * packet.time_base if stamps else Fraction(0)


def length_of(pts: list[int | None], timing: Timing, stream: VideoStream) -> Fraction:
    """Seconds from the first picture to the end of the last."""
    frame = 1 / nominal_rate(stream)
    times = [t for t in pts if t is not None]
    return (max(times) - min(times)) * tick(stream) + frame if timing == "time" else len(pts) * frame


def check_survey(survey: Survey, span: Span | None, settings: DecodeSettings) -> None:
    """Raise VideoError for a video not worth decoding: nothing in it, cut off, or longer than the limit."""
    if survey.packets == 0 and span is not None:
        raise VideoError("empty_span", f"the file holds no picture from {span.start:g} s on")
    if survey.packets == 0 and survey.declared:
        raise VideoError("truncated", f"the header promises {survey.declared:g} s, but the file holds no picture")
    if survey.packets == 0:
        raise VideoError("no_frames", "the file holds a video stream without any picture")
    if survey.share < MIN_DECODED_SHARE:
        raise VideoError(
            "truncated", f"the file is cut off: only {survey.share:.0%} of the duration in its header is there"
        )
    seconds = float(survey.seconds)
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

    def __init__(self, container: InputContainer, stream: VideoStream, span: Span | None, survey: Survey) -> None:
        self.container, self.stream, self.span, self.survey = container, stream, span, survey
        self.decoded = self.lost = self.corrupt = 0
        self.finished = False  # the file was read to its end, not only to the end of the span
        self.origin = Fraction(0)

    def timed_frames(self, on_progress: Callable[[], None]) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
        """(time, end time, frame), in seconds from the span's start or from the first frame, times rising."""
        frame_s, by_time = 1 / nominal_rate(self.stream), self.survey.timing == "time"
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
        if self.span is not None and self.survey.seekable:
            seek(self.container, self.stream, self.span.start)
        first = True
        for packet in read_packets(self.container, on_progress):
            if packet.stream_index != self.stream.index:
                continue
            if first and self.survey.seekable:
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
            self.lost = max(self.lost, self.survey.pictures - self.decoded)
        return self.lost + self.corrupt

    def share(self) -> float:
        """Part of the frames that the file should hold that decoded without error."""
        damaged = self.damaged()
        return self.survey.share * (1 - damaged / max(1, self.decoded + self.lost))

    def check(self) -> None:
        """Raise VideoError where too little decoded."""
        damaged, count = self.damaged(), self.decoded + self.lost
        if count == 0:
            raise VideoError("no_frames", "the decoder yields no frame and reports no error")
        if self.share() < MIN_DECODED_SHARE:
            kind: Kind = "truncated" if self.survey.share < 1 - damaged / count else "corrupt"
            reach = "" if self.survey.share == 1 else f", and the file is cut off at {self.survey.share:.0%}"
            raise VideoError(kind, f"{damaged} of {count} frames are lost or decode with errors{reach}")

    def info(self, scaler: _Scaler, *, frames: int, duration: float) -> VideoInfo:
        height, width = scaler.size
        return VideoInfo(
            codec=self.stream.codec_context.name,
            pixel_format=scaler.pixel_format,
            source_height=scaler.source_size[0],
            source_width=scaler.source_size[1],
            source_fps=float(nominal_rate(self.stream)),
            rotation=scaler.first_orientation.rotation,
            timing=self.survey.timing,
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


class Orientation(NamedTuple):
    """How to show a stored picture upright: swap its axes, then mirror left-right, then top-bottom."""

    transposed: bool
    mirrored_x: bool
    mirrored_y: bool

    @property
    def rotation(self) -> int:
        """The same in degrees counterclockwise, 0 where it is not a rotation alone."""
        return {(True, False, True): 90, (False, True, True): 180, (True, True, False): 270}.get(self, 0)

    def apply(self, picture: RGBFrame) -> RGBFrame:
        upright = picture.swapaxes(0, 1) if self.transposed else picture
        return np.ascontiguousarray(upright[:: -1 if self.mirrored_y else 1, :: -1 if self.mirrored_x else 1])


def read_orientation(frame: VideoFrame) -> Orientation:
    """The display matrix to the nearest quarter turn; upright where there is none.

    Not for every frame: PyAV ties a frame to its side data in a cycle, and frames would pile up until one is collected.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(side_data, SideData):
        return Orientation(False, False, False)
    a, b, _, c, d = struct.unpack_from("=5i", bytes(side_data))  # x' = a·x + c·y, y' = b·x + d·y
    return Orientation(True, c < 0, b < 0) if abs(b) + abs(c) > abs(a) + abs(d) else Orientation(False, a < 0, d < 0)


class _Scaler:
    """Frames of any size, pixel format and rotation → RGB of the one size that the first frame sets."""

    def __init__(self, short_side: int) -> None:
        self.short_side = short_side
        self.size = self.source_size = (0, 0)  # (height, width)
        self.orientation = self.first_orientation = Orientation(False, False, False)
        self.degrees: int | None = None  # the display matrix that `orientation` was read from, as PyAV sums it up
        self.pixel_format = ""
        self.reformatter = VideoReformatter()

    def convert(self, frame: VideoFrame) -> RGBFrame:
        """(H,W,3) uint8. Raises VideoError("bad_shape")."""
        if frame.rotation != self.degrees:
            self.degrees, self.orientation = frame.rotation, read_orientation(frame)
        if not self.pixel_format:
            self.begin(frame)
        height, width = self.size[::-1] if self.orientation.transposed else self.size
        rgb = self.reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=SCALING, threads=1
        )
        return self.orientation.apply(rgb.to_ndarray().astype(np.uint8, copy=False))

    def begin(self, frame: VideoFrame) -> None:
        """Let the first frame set the size of all."""
        self.pixel_format, self.first_orientation = frame.format.name, self.orientation
        self.source_size = (frame.height, frame.width)
        shown = self.source_size[::-1] if self.orientation.transposed else self.source_size
        self.size = output_size(*shown, self.short_side)
