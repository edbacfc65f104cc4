"""What features are: frame rate, windows, ends, size, crops, layout. Presets are values of this (presets.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from models.input_spec import STREAMS, Stream
from pipelines.errors import SettingsError
from pipelines.media.decode import MAX_SHORT_SIDE
from pipelines.media.resize import MAX_ASPECT_RATIO

Pad = Literal["loop", "drop", "repeat", "zeros"]
FlowEnd = Literal["repeat", "zero", "shorten"]
Layout = Literal["parquet", "npy", "npy-streams", "npy-transposed", "video-features"]
FrameSize = int | tuple[int, int]  # the shorter side, or (width, height), in pixels

MAX_WINDOW = 10_000  # frames; beyond it a window's frames do not fit into a worker's memory
FLAT_LAYOUTS: tuple[Layout, ...] = ("npy-transposed", "video-features")  # arrays that have no axis for crops
_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """How the features of a video are cut, computed and written."""

    fps: float | Literal["native"] = 25.0
    """Frames per second that videos are sampled at. native: every frame that is in the file."""
    window: int = 64
    """Frames that the network sees at a time; of a network trained on every 4th frame, every 4th of 4 times as many."""
    stride: int = 64
    """Frames of the video between the starts of neighbouring windows."""
    pad: Pad = "loop"
    """What becomes of a video's end. loop: frames after the last whole window are left out, and a video shorter than a
    window is looped to one. drop: such a video goes to quarantine. repeat: the last frame is repeated until the last
    window is whole. zeros: a window is centred on each stride-th frame, and what it sees beyond the ends is zero."""
    flow_end: FlowEnd = "repeat"
    """The last frame has no flow to a next one. repeat: it gets that of the frame before; zero: it gets zeros;
    shorten: it is left out of both streams."""
    resize: str | None = None
    """Size that frames are brought to before flow is computed: the shorter side in pixels, or WIDTHxHEIGHT. None: what
    the networks were trained on."""
    crops: Literal[1, 5, 10] = 1
    """1: the centre. 5: the four corners (top left, top right, bottom left, bottom right) and the centre. 10: those,
    then each of them mirrored."""
    layout: Layout = "parquet"
    """parquet: one row per window, stream and crop, with timestamps. npy: ID.npy, (windows, channels), RGB then flow.
    npy-streams: rgb/ID.npy and flow/ID.npy. npy-transposed: ID.npy, (channels, windows). video-features: ID_rgb.npy,
    ID_flow.npy, ID_fps.npy, ID_timestamps_ms.npy."""
    streams: tuple[Stream, ...] | None = None
    """Streams to write. None: those whose networks are given."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers that are written."""

    def __post_init__(self) -> None:
        if self.fps != "native" and not 0 < self.fps <= 1000:
            raise SettingsError(f"--fps is {self.fps}: give frames per second, above 0 to 1000, or native")
        if not 1 <= self.window <= MAX_WINDOW:
            raise SettingsError(f"--window is {self.window}: give 1 to {MAX_WINDOW:,} frames")
        if self.stride < 1:
            raise SettingsError(f"--stride is {self.stride}: give at least 1 frame")
        if self.crops > 1 and self.layout in FLAT_LAYOUTS:
            raise SettingsError(
                f"--crops is {self.crops}, and arrays of --layout {self.layout} have no axis for crops: give --crops 1 "
                "or one of the layouts parquet, npy and npy-streams"
            )
        if self.streams is not None and (not self.streams or len(set(self.streams)) < len(self.streams)):
            raise SettingsError(f"--streams is {' '.join(self.streams) or 'empty'}: give rgb, flow, or both once each")
        _ = self.frame_size

    @property
    def frame_size(self) -> FrameSize | None:
        """`resize` as a number or as (width, height). Raises SettingsError for what is neither."""
        if self.resize is None:
            return None
        found = _SIZE.fullmatch(self.resize)
        sides = [int(side) for side in found.groups() if side] if found else []
        fits = all(2 <= side <= MAX_SHORT_SIDE and side % 2 == 0 for side in sides)
        if not sides or not fits or max(sides) > MAX_ASPECT_RATIO * min(sides):
            raise SettingsError(
                f"--resize is {self.resize!r}: give the shorter side in pixels, such as 256, or WIDTHxHEIGHT, such as "
                f"340x256; even numbers, 2 to {MAX_SHORT_SIDE}, of which one is at most {MAX_ASPECT_RATIO} times the "
                "other"
            )
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])

    def chosen_streams(self, given: tuple[Stream, ...]) -> tuple[Stream, ...]:
        """The streams to write, RGB before flow, of those whose networks are `given`. Raises SettingsError."""
        wanted = given if self.streams is None else self.streams
        if missing := set(wanted) - set(given):
            flags = " and ".join(f"--{stream}" for stream in STREAMS if stream in missing)
            raise SettingsError(f"--streams is {' '.join(wanted)}: {flags} must name a network for that")
        if not wanted:
            raise SettingsError("no network is given: name one by --rgb, by --flow, or one by each")
        return tuple(stream for stream in STREAMS if stream in wanted)
