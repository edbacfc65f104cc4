"""What the clock of a video stream says, and whether to believe it.

Times are exact: fractions of a second, made from a stream's integer stamps. Nothing is decoded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

Timing = Literal["time", "order"]

PAUSE_S = 10.0  # a longer gap, or ten frames if they last longer, is looked at: is it a pause or a broken clock?
JUMP_S = 10  # FFmpeg's -dts_delta_threshold: in a stream that may be joined, a longer jump is a new clock
STEP_BACK_S = Fraction(1, 10)  # FFmpeg's tolerance for steps backward
MAX_REORDER = 32  # packets; decoders hold back at most 16 pictures, and a picture may be two packets
MAX_DOUBLED = 0.5  # share of pictures that may have the time of another one, as in every second of a doubled rate
CLOCK_MAY_JUMP = 0x0200  # FFmpeg's AVFMT_TS_DISCONT: MPEG-TS, MPEG-PS, Ogg


class Clock:
    """Makes one clock of several: parts of a joined recording follow one another, as FFmpeg's command line has it.

    Only in containers that may be cut and joined anywhere. There a packet whose decode time is over JUMP_S seconds off
    what was due, or over a tenth of a second before its predecessor's, starts a new clock (`ts_discontinuity_detect`).
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.may_jump = bool(container.format.flags & CLOCK_MAY_JUMP)
        self.frame, self.tick = 1 / nominal_rate(stream), tick(stream)
        self.offset = 0
        self.last: int | None = None  # decode time of the packet before, straightened
        self.due = 0

    def straighten(self, packet: Packet) -> None:
        """Correct the stamps of the stream's next packet."""
        if not self.may_jump:
            return
        shift(packet, self.offset)
        if packet.dts is None:
            return
        if self.last is not None and self.jumps(packet.dts):
            jump = self.due - packet.dts
            self.offset += jump
            shift(packet, jump)
        self.last = packet.dts
        self.due = packet.dts + (packet.duration or round(self.frame / self.tick))

    def jumps(self, dts: int) -> bool:
        assert self.last is not None
        return abs(dts - self.due) * self.tick > JUMP_S or (self.last - dts) * self.tick > STEP_BACK_S


def shift(packet: Packet, ticks: int) -> None:
    """Move a packet in time."""
    if packet.pts is not None:
        packet.pts += ticks
    if packet.dts is not None:
        packet.dts += ticks


@dataclass(frozen=True)
class Stamps:
    """The stamps of a stream's pictures in file order, in ticks, and what they are stamps of."""

    pts: list[int | None]
    dts: list[int | None]
    container: str  # FFmpeg's name
    tick: Fraction  # seconds
    rate: Fraction  # nominal frames a second

    def judge(self) -> Timing:
        """Whether presentation times place frames ("time") or the order of decoding does ("order").

        Times are trusted where all of this holds: the container is not AVI, which stores none (what FFmpeg makes up for
        it is out of order on UCF-101, HMDB-51, NTU and UT-Interaction clips whose frames decode in the right order);
        every packet has one; decode times never fall; at most MAX_DOUBLED of them are equal; and a long gap is one of
        decode times and of the file's order as well. Besides, the decoder must put out the first frames with rising
        times (`pipelines.media.decode.rises`; not so where an AVI was copied into another container). Otherwise frame i
        of the decoder's output order is shown at i / nominal rate.
        """
        times = [t for t in self.pts if t is not None]
        if self.container == "avi" or len(times) < len(self.pts) or not times:
            return "order"
        order = np.argsort(np.array(times, np.int64), kind="stable")
        gaps = np.diff(np.array(times, np.int64)[order])
        if gaps.size == 0:
            return "time"
        steps = self.decode_steps()
        sane = steps.min(initial=0) >= 0 and np.count_nonzero(gaps == 0) <= MAX_DOUBLED * len(times)
        long = [at for at in np.flatnonzero(gaps > self.pause()) if sane]
        sane = sane and all(is_pause(order, int(at)) and steps.max(initial=0) > gaps[at] / 2 for at in long)
        return "time" if sane else "order"

    def pause(self) -> float:
        """Ticks from which on a gap is looked at."""
        return max(PAUSE_S, float(10 / self.rate)) / float(self.tick)

    def decode_steps(self) -> npt.NDArray[np.int64]:
        """Ticks from each decode time to the next in the file."""
        times = np.array([t for t in self.dts if t is not None], np.int64)
        return times[1:] - times[:-1]

    def longest_gap(self, timing: Timing) -> float:
        """Seconds between the two neighbours in time that are farthest apart."""
        return float(np.diff(self.clock(timing)).max(initial=0) * float(self.tick))

    def length(self, timing: Timing) -> Fraction:
        """Seconds from the first picture to the end of the last."""
        times, frame = self.clock(timing), 1 / self.rate
        return int(times[-1] - times[0]) * self.tick + frame if times.size else len(self.pts) * frame

    def clock(self, timing: Timing) -> npt.NDArray[np.int64]:
        """Rising stamps that pictures are shown by, in ticks: an AVI numbers its packets. Empty: their order alone."""
        stamps = self.pts if timing == "time" else self.dts if self.container == "avi" else []
        return np.sort(np.array([t for t in stamps if t is not None], np.int64))


def is_pause(order: npt.NDArray[np.int64], at: int) -> bool:
    """Whether the pictures up to place `at` in time are, reordering aside, also those that come first in the file."""
    return bool(order[: at + 1].max() - order[at + 1 :].min() <= MAX_REORDER)


def packet_time(packet: Packet) -> Fraction | None:
    """Seconds at which a packet is decoded, or else shown; None where it has neither stamp."""
    stamp = packet.pts if packet.dts is None else packet.dts
    return None if stamp is None else stamp * packet.time_base


def packet_end(packet: Packet, default: Fraction) -> Fraction | None:
    """Seconds up to which a packet is shown or heard, `default` long where it does not say; None if it has no stamp."""
    stamps = [stamp for stamp in (packet.pts, packet.dts) if stamp is not None]
    if not stamps:
        return None
    return max(stamps) * packet.time_base + ((packet.duration or 0) * packet.time_base or default)


def nominal_rate(stream: VideoStream) -> Fraction:
    """Frames a second the stream claims; 25 where it claims nothing believable."""
    rate = stream.guessed_rate or stream.average_rate
    return Fraction(25) if rate is None or not 0 < rate <= 1000 else rate


def tick(stream: VideoStream) -> Fraction:
    """Seconds in one unit of the stream's timestamps."""
    assert stream.time_base is not None  # only an encoder's stream may lack it
    return stream.time_base


def stream_start(stream: VideoStream) -> Fraction:
    """Seconds on the file's clock at which the stream begins."""
    return (stream.start_time or 0) * tick(stream)


def time_zero(container: InputContainer, stream: VideoStream) -> Fraction:
    """Seconds on the file's clock at which a player shows 0:00: where its first stream begins, be it sound."""
    own = stream_start(stream)
    if container.start_time is None:
        return own
    first = Fraction(container.start_time, av.time_base)
    return own if abs(own - first) * av.time_base < 2 else first  # FFmpeg rounds it to microseconds
