"""Decoded frames of any size, pixel format and rotation → upright RGB pictures of one size."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipelines.errors import VideoError

RGBFrame = NDArray[np.uint8]  # (H,W,3)

MAX_ASPECT_RATIO = 8
SCALING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


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


def round_half_up(value: Fraction) -> int:
    """Nearest integer, halves upward: FFmpeg's `round=near` for the sizes and times at hand, which are not negative."""
    return math.floor(value + Fraction(1, 2))


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


class ProgressiveView:
    """Frames as whole pictures, also those that are flagged as two fields.

    swscale scales the fields of a flagged frame one by one, which combs every edge of what is or only claims to be
    interlaced; FFmpeg's scale filter takes the picture as a whole unless it is told otherwise. Nothing is deinterlaced:
    at half the height and less the two fields are averaged.
    """

    def __init__(self) -> None:
        self.kind: tuple[int, int, str] | None = None
        self.graph: Graph | None = None

    def of(self, frame: VideoFrame) -> VideoFrame:
        """The frame, its pixels shared, without the flag."""
        if not frame.interlaced_frame:
            return frame
        kind = frame.width, frame.height, frame.format.name
        if self.graph is None or kind != self.kind:
            self.kind, self.graph = kind, build_setfield(*kind)
        frame.pts, frame.time_base = 0, Fraction(1, 25)  # a filter minds times, and the picture's is known by now
        self.graph.push(frame)
        view = self.graph.pull()
        assert isinstance(view, VideoFrame)
        return view


def build_setfield(width: int, height: int, pixel_format: str) -> Graph:
    """A filter graph that takes the interlaced flag off frames."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=VideoFormat(pixel_format), time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("setfield", "prog"), graph.add("buffersink")).configure()
    return graph


class Scaler:
    """Frames of any size, pixel format and rotation → RGB of the one size that the first frame sets.

    `choose_size` makes that (height, width) of the video's own, upright.
    """

    def __init__(self, choose_size: Callable[[int, int], tuple[int, int]]) -> None:
        self.choose_size = choose_size
        self.size = self.source_size = (0, 0)  # (height, width)
        self.orientation = self.first_orientation = Orientation(False, False, False)
        self.degrees: int | None = None  # the display matrix that `orientation` was read from, as PyAV sums it up
        self.pixel_format = ""
        self.reformatter = VideoReformatter()
        self.progressive = ProgressiveView()

    def convert(self, frame: VideoFrame) -> RGBFrame:
        """(H,W,3) uint8. Raises VideoError("bad_shape")."""
        if frame.rotation != self.degrees:
            self.degrees, self.orientation = frame.rotation, read_orientation(frame)
        if not self.pixel_format:
            self.begin(frame)
        height, width = self.size[::-1] if self.orientation.transposed else self.size
        rgb = self.reformatter.reformat(
            self.progressive.of(frame), width=width, height=height, format="rgb24", interpolation=SCALING, threads=1
        )
        return self.orientation.apply(rgb.to_ndarray().astype(np.uint8, copy=False))

    def begin(self, frame: VideoFrame) -> None:
        """Let the first frame set the size of all."""
        self.pixel_format, self.first_orientation = frame.format.name, self.orientation
        self.source_size = (frame.height, frame.width)
        shown = self.source_size[::-1] if self.orientation.transposed else self.source_size
        self.size = self.choose_size(*shown)
