"""What a video file holds, from its header and packets: nothing is decoded.

The only place that opens a source's file; FFmpeg is kept from opening anything else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from pipelines.errors import VideoError

Timing = Literal["time", "order"]

MAX_GAP_S = 10.0
INDEXED = ("mov", "matroska", "avi")  # elsewhere FFmpeg guesses positions and may land behind the span
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


@dataclass(frozen=True)
class Probe:
    """What the packets say, without decoding any."""

    packets: int  # of the video stream, in the file or in the span
    pictures: int  # of these, the ones that must become a frame
    timing: Timing
    seconds: Fraction  # from the first picture to the last
    declared: float | None  # seconds that the header promises, where it is known to know and the whole file was read
    share: float  # part of these that the packets reach, at most 1
    seekable: bool  # the container finds the keyframe before the span


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


def probe_packets(
    container: InputContainer, stream: VideoStream, span: Span | None, on_progress: Callable[[], None]
) -> Probe:
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
    return Probe(
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


def length_of(pts: list[int | None], timing: Timing, stream: VideoStream) -> Fraction:
    """Seconds from the first picture to the end of the last."""
    frame = 1 / nominal_rate(stream)
    times = [t for t in pts if t is not None]
    return (max(times) - min(times)) * tick(stream) + frame if timing == "time" else len(pts) * frame


def promised_duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds that a complete file would last, None where its kind does not tell without being read to the end."""
    name, duration = format_name(container), duration_of(container)
    if name not in DECLARES_DURATION:
        return None
    # FFmpeg shortens an AVI's duration to what is there of it, but keeps the header's count.
    return max(duration or 0, float(stream.frames * tick(stream))) if name == "avi" else duration


def duration_of(container: InputContainer) -> float | None:
    """Seconds the container says it lasts, None where it does not say."""
    return None if container.duration is None else container.duration / av.time_base


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


def seek(container: InputContainer, stream: VideoStream, start: float) -> None:
    """Move to the keyframe at or before `start` seconds; stay at the file's start where it has no index to find it."""
    if format_name(container) not in INDEXED:
        return
    with suppress(av.error.FFmpegError):
        offset = (Fraction(start) + time_zero(stream)) / tick(stream)
        container.seek(math.floor(offset), stream=stream, backward=True)


def packet_time(packet: Packet) -> Fraction | None:
    """Seconds at which a packet is decoded, or else shown; None where it has neither stamp."""
    stamp = packet.pts if packet.dts is None else packet.dts
    return None if stamp is None else stamp * packet.time_base


def packet_end(packet: Packet) -> Fraction:
    """Seconds up to which a packet is shown or heard; 0 where it has no stamp."""
    stamps = [stamp for stamp in (packet.pts, packet.dts) if stamp is not None]
    return (max(stamps) + (packet.duration or 0)) * packet.time_base if stamps else Fraction(0)


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
