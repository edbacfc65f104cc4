"""What a video file holds, from its header and packets: nothing is decoded.

The only place that opens a source's file; FFmpeg is kept from opening anything else.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from pipelines.errors import VideoError
from pipelines.media.timestamps import (
    Clock,
    Stamps,
    Timing,
    nominal_rate,
    packet_end,
    packet_time,
    stream_start,
    tick,
    time_zero,
)

INDEXED = ("mov", "matroska", "avi")  # elsewhere FFmpeg guesses positions and may land behind the span
# Pictures themselves tell which are keyframes, so what lies before the first one is known to be undecodable.
CUT_ANYWHERE = ("mpegts", "mpeg", "h264", "hevc", "vvc", "mpegvideo", "m4v")
COUNTED_PICTURES = 1000  # of several video streams, to tell films from posters
# Playlists (hls, concat, dash), image sequences, devices and lavfi are left out: they open other files and URLs.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,flv,asf,ogg,rm,mxf,"
    "mjpeg,apng,nut,dv,h261,h263,vc1,nsv,yuv4mpegpipe,wtv,webp,mp3,aac,flac,wav,amr,aiff,ac3"
)
JPEG_START = b"\xff\xd8\xff"
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

    stream: int  # index of the video stream
    offset: int | None  # the stamp to seek to for the span; None: read from the file's start
    packets: int  # of the video stream, in the file or in the span
    lead_in: int  # of these, the first ones that nothing can be decoded from: what they refer to was cut off
    first_pts: int | None  # of the first keyframe; None where times say nothing
    pictures: int  # packets that must become a frame
    timing: Timing
    seconds: Fraction  # from the first picture to the last
    longest_gap: float  # seconds between neighbours in time
    declared: float | None  # seconds that the header promises, where it is known to know and the whole file was read
    share: float  # part of these that the packets reach, at most 1


@contextmanager
def open_video(path: str | os.PathLike[str], index: int | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A local file and its main video stream, or the one of this index. Raises VideoError."""
    with open_container(path) as container:
        stream = pick_stream(container, path) if index is None else container.streams[index]
        assert isinstance(stream, VideoStream)
        stream.codec_context.thread_count = 1
        yield container, stream


@contextmanager
def open_container(path: str | os.PathLike[str]) -> Iterator[InputContainer]:
    """A local file, with FFmpeg kept from opening anything else. Raises VideoError."""
    file = Path(path).absolute()
    if not file.is_file():
        raise VideoError("unreadable", "not a regular file" if file.exists() else "there is no such file")
    if file.stat().st_size == 0:
        raise VideoError("unreadable", "the file is empty (0 bytes)")
    with file.open("rb") as raw:  # JPEG after JPEG: FFmpeg's first guess is a folder of pictures
        motion_jpeg = raw.read(len(JPEG_START)) == JPEG_START
    limits = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    name = "mjpeg" if motion_jpeg else None
    with av.open(f"file:{file}", format=name, container_options=limits, metadata_errors="replace") as container:
        yield container


def pick_stream(container: InputContainer, path: str | os.PathLike[str]) -> VideoStream:
    """The main video stream: a film before a poster, the default before others, the largest, the first.

    Attached pictures never count; a poster is a stream of one picture beside a longer one. Of several streams that are
    the default, or where none is, those with less than half of the pictures of the longest stand back, and the one with
    the most pixels is taken, as FFmpeg does. Raises VideoError.
    """
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        others = sorted({s.type for s in container.streams} - {"video"})
        cover = " and a cover picture" if container.streams.video else ""
        raise VideoError("no_video_stream", f"no video stream, only {', '.join(others) or 'nothing at all'}{cover}")
    known = [s for s in videos if s.codec_context is not None]
    if not known:
        raise VideoError("unreadable", "this build of FFmpeg has no decoder for the video stream")
    if len(known) == 1:
        return known[0]
    counts = count_pictures(path)
    films = [s for s in known if counts[s.index] > 1] or known
    films = [s for s in films if s.disposition & Disposition.default] or films
    long = max(counts[s.index] for s in films) / 2
    return max(
        (s for s in films if counts[s.index] >= long), key=lambda s: s.codec_context.width * s.codec_context.height
    )


def count_pictures(path: str | os.PathLike[str]) -> Counter[int]:
    """Packets of each stream by index, up to where the first one has COUNTED_PICTURES."""
    counts: Counter[int] = Counter()
    with open_container(path) as container:
        for packet in demux(container):
            counts[packet.stream_index] += packet.stream.type == "video" and packet.size > 0
            if counts[packet.stream_index] >= COUNTED_PICTURES:
                break
    return counts


class _Packets:
    """What is gathered of the packets while they pass."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container, self.stream = container, stream
        self.frame = 1 / nominal_rate(stream)
        self.reach = time_zero(container, stream)  # seconds on the file's clock that the packets of all streams reach
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []
        self.is_picture: list[bool] = []
        self.first_key: int | None = None  # position of the first keyframe
        self.primed = False  # an edit list hides a keyframe that the first pictures shown refer to

    def gather(self, span: Span | None, on_progress: Callable[[], None]) -> None:
        """Read up to the end of the span or of the file. Raises VideoError("encrypted")."""
        zero, end = time_zero(self.container, self.stream), None if span is None else span.end
        for packet in read_packets(self.container, self.stream, on_progress):
            ours, time = packet.stream_index == self.stream.index, packet_time(packet)
            self.reach = max(self.reach, packet_end(packet, self.frame if ours else Fraction(0)) or self.reach)
            if ours and end is not None and time is not None and time - zero > end:
                return
            if ours:
                self.add(packet)

    def add(self, packet: Packet) -> None:
        if packet.has_sidedata("encryption_info"):
            raise VideoError("encrypted", "the video stream is encrypted (DRM); decrypt it first")
        if packet.is_discard:
            self.primed |= packet.is_keyframe
            return
        if packet.is_keyframe and self.first_key is None:
            self.first_key = len(self.pts)
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.is_picture.append(holds_picture(packet, self.stream.codec_context.name))

    def lead_in(self) -> int:
        """Packets before the first keyframe, where the pictures themselves tell which it is."""
        return self.first_key or 0 if format_name(self.container) in CUT_ANYWHERE else 0

    def first_pts(self, timing: Timing) -> int | None:
        """When the keyframe that decoding begins with is shown; what is shown before it may refer to what is not there.

        None where times say nothing, or a container's flags claim that the file begins without a keyframe.
        """
        begins = not self.primed and self.first_key is not None and self.first_key == self.lead_in()
        return self.pts[self.lead_in()] if begins and timing == "time" else None

    def reached(self, timing: Timing, stamps: Stamps) -> Fraction:
        """Seconds of the file that are there: up to the last stamp, or as many as the pictures fill without any."""
        reach = self.reach - min(Fraction(0), time_zero(self.container, self.stream))
        return max(reach, stamps.length(timing)) if timing == "order" else reach

    def count(self, timing: Timing) -> int:
        """Pictures that must become a frame: those before the first keyframe, in the file or in time, need not."""
        first, first_pts = self.lead_in(), self.first_pts(timing)
        due = zip(self.pts[first:], self.is_picture[first:], strict=True)
        return sum(holds and not precedes(pts, first_pts) for pts, holds in due)


def probe_packets(
    container: InputContainer,
    stream: VideoStream,
    span: Span | None,
    offset: int | None,
    on_progress: Callable[[], None],
) -> Probe:
    """Read the packets, of the span or of the whole file, without decoding. Raises VideoError("encrypted")."""
    if offset is not None:
        container.seek(offset, stream=stream, backward=True)
    packets = _Packets(container, stream)
    packets.gather(span, on_progress)
    stamps = Stamps(packets.pts, packets.dts, format_name(container), tick(stream), nominal_rate(stream))
    timing = stamps.judge()
    declared = promised_duration(container, stream) if span is None else None
    return Probe(
        stream=stream.index,
        offset=offset,
        packets=len(packets.pts),
        lead_in=packets.lead_in(),
        first_pts=packets.first_pts(timing),
        pictures=packets.count(timing),
        timing=timing,
        seconds=stamps.length(timing),
        longest_gap=stamps.longest_gap(timing),
        declared=declared,
        share=share_of(packets.reached(timing, stamps), declared, packets.frame),
    )


def precedes(pts: int | None, first_pts: int | None) -> bool:
    """Whether a picture is shown before the first keyframe: it may refer to what is not there."""
    return pts is not None and first_pts is not None and pts < first_pts


def share_of(reach: Fraction, declared: float | None, frame: Fraction) -> float:
    """Part of the promised seconds that packets reach, at most 1; a frame less is a matter of rounding."""
    return 1.0 if not declared or declared - reach <= 1.01 * frame else float(reach) / declared


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


def read_packets(container: InputContainer, stream: VideoStream, on_progress: Callable[[], None]) -> Iterator[Packet]:
    """The packets of all streams in file order, up to the end or to where the file cannot be read on.

    Those of the video stream run on one clock, see `Clock`.
    """
    clock = Clock(container, stream)
    for packet in demux(container):
        on_progress()
        if packet.size:
            if packet.stream_index == stream.index:
                clock.straighten(packet)
            yield packet


def demux(container: InputContainer) -> Iterator[Packet]:
    """What FFmpeg reads from the file, up to where it cannot."""
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
        yield packet


def holds_picture(packet: Packet, codec: str) -> bool:
    """Whether a packet must become a frame: VP8 hides some, and MPEG-4 in AVI stands empty ones in for repeats."""
    if codec == "vp8":
        return bool(bytes(packet)[0] & 0x10)
    return codec != "mpeg4" or packet.size > 8


def find_offset(container: InputContainer, stream: VideoStream, start: float) -> int | None:
    """The stamp to seek to so that all pictures from `start` seconds on decode; None: read from the file's start.

    Only what the file's own index finds is trusted, and only if it leads to a keyframe that is shown at or before
    `start`: containers look for decode times, which may be those of pictures shown later. An AVI counts packets, and
    the place of a picture among them is known only where pictures are stored in the order of display.
    """
    name = format_name(container)
    if name not in INDEXED or (name == "avi" and stream.codec_context.codec.reorder):
        return None
    wanted = Fraction(start) + time_zero(container, stream)
    for back in (0, 1, 3, 7, 15, 31):
        offset = math.floor((wanted - back) / tick(stream))
        landed = land(container, stream, offset) if offset * tick(stream) > stream_start(stream) else None
        if landed is None:
            return None
        if landed * tick(stream) <= wanted:
            return offset
    return None


def land(container: InputContainer, stream: VideoStream, offset: int) -> int | None:
    """The stamp of the keyframe that seeking to `offset` leads to; None where it leads to none."""
    try:
        container.seek(offset, stream=stream, backward=True)
        packet = next(p for p in container.demux(stream) if p.size)
    except (av.error.FFmpegError, StopIteration, IndexError):
        return None
    stamp = packet.dts if packet.pts is None or format_name(container) == "avi" else packet.pts
    return stamp if packet.is_keyframe else None


def format_name(container: InputContainer) -> str:
    """FFmpeg's name of the container, the first of its aliases: "mov", "matroska", "avi"…"""
    return container.format.name.split(",")[0]
