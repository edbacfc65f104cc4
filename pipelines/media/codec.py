"""Frames and flow as compressed bytes and back, with the error measured.

Flow is stored as integer codes of its clipped pixels, u stacked over v in one grey video: 1/5 of the bytes of the usual
JPEG pairs at a smaller error, and a window of 64 frames costs itself and at most one keyframe interval to read.
Three zero conventions circulate for 8-bit flow, and a network trained with one reads the others with a bias:

* denseflow and TSN: round((f + bound) 255 / 2 bound). Zero lies between codes 127 and 128 and is stored as 128;
* an integer cast of the same expression, as in many Python ports of it: zero is 127;
* video_features: 128 + f 255 / 2 bound. Zero is 128 and the top of the range overflows.

So bound, levels and zero code travel beside the data (`CodecSettings.flow_convention`), and readers refuse what they do
not know. `jpeg` here is denseflow's convention; in the other codecs zero flow has a code of its own.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, cast

import av
import cv2
import numpy as np
import numpy.typing as npt
from tyro.conf import arg

from pipelines.errors import ConventionError, SettingsError
from pipelines.formatting import format_count
from pipelines.media.mp4 import (
    FULL_RANGE,
    VIDEO_RANGE,
    Area,
    VideoFormat,
    VideoWriter,
    read_frames,
    read_grey,
    read_rgb,
)

FlowCodec = Literal["h264", "lossless", "jpeg"]
RGBCodec = Literal["h264", "av1"]
Convention = Mapping[str, str | int | float]
Codes = npt.NDArray[np.integer]
T = TypeVar("T", bound=Sequence[Any] | npt.NDArray[Any])

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # a zip must carry a date, and the bytes must not depend on it
SVT_AV1_MIN_SIDE = 4
# What a stored video that is damaged makes its decoders raise.
DECODING_ERRORS = (ValueError, LookupError, OSError, av.FFmpegError, cv2.error)
MAX_KEYFRAME_INTERVAL = 10_000  # far beyond any use, and still a number that encoders take


@dataclass(frozen=True, kw_only=True)
class FlowScale:
    """How pixels of motion become integer codes: code = round(zero_code + f / step), f clipped to +-bound."""

    bound: float
    levels: int
    zero_code: float

    @property
    def step(self) -> float:
        """Pixels of motion between neighbouring codes."""
        return 2 * self.bound / (self.levels - 1)

    @property
    def lowest(self) -> int:
        """The code of -bound; +bound is `lowest + levels - 1`."""
        return round(self.zero_code - (self.levels - 1) / 2)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """uint8 up to 256 levels, uint16 above."""
        return np.uint8 if self.levels <= 256 else np.uint16


@dataclass(frozen=True, kw_only=True)
class _FlowFormat:
    """What follows from a flow codec's name; without a video format it is pairs of JPEGs."""

    levels: int
    zero_code: float
    quality: int
    video: VideoFormat | None
    layout: str = "u_over_v"
    extension: str = "flow.mp4"


_SVT_AV1 = {"preset": "8", "svtav1-params": "lp=1"}
# Macroblock tree, x264's default, decides by what lies in memory: the same frames gave several files.
_X264_RGB = {"preset": "veryfast", "x264-params": "mbtree=0"}
# What the eye likes is not what flow needs (benchmarks/codec.py takes each option back in turn): adaptive quantisation
# and quantisers that follow the motion spend their bits in the wrong places, deblocking, at coarser quality than the
# default, smears small moving things, B-frames and extra keyframes cost time.
X264_FLOW_PARAMS = {
    "mbtree": "0",
    "qcomp": "1",
    "aq-mode": "0",
    "no-deblock": "1",
    "bframes": "0",
    "scenecut": "0",
    "weightp": "0",
    "subme": "4",
}
_X264_FLOW = {
    "preset": "veryfast",
    "x264-params": ":".join(f"{name}={value}" for name, value in X264_FLOW_PARAMS.items()),
}
# 1023 of 1024 codes, 255 of 256: an odd number of levels has a middle one, and that is zero.
_FLOW_FORMATS = {
    "h264": _FlowFormat(
        levels=1023,
        zero_code=512,
        quality=15,
        video=VideoFormat(encoder="libx264", pixel_format="gray10le", color_range=FULL_RANGE, options=_X264_FLOW),
    ),
    "lossless": _FlowFormat(
        levels=255,
        zero_code=128,
        quality=0,
        video=VideoFormat(encoder="libx264", pixel_format="gray", color_range=FULL_RANGE, options=_X264_FLOW),
    ),
    "jpeg": _FlowFormat(
        levels=256, zero_code=127.5, quality=95, video=None, layout="flow_x_and_flow_y", extension="flow.zip"
    ),
}
_RGB_FORMATS = {
    "h264": VideoFormat(encoder="libx264", pixel_format="yuv420p", color_range=VIDEO_RANGE, options=_X264_RGB),
    "av1": VideoFormat(encoder="libsvtav1", pixel_format="yuv420p", color_range=VIDEO_RANGE, options=_SVT_AV1),
}
_RGB_QUALITY = {"h264": 20, "av1": 26}
_WORST_QUALITY = {"av1": 63, "h264": 51, "lossless": 0, "jpeg": 100}


@dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """How flow and RGB are stored."""

    flow_codec: Annotated[FlowCodec, arg(name="codec")] = "h264"
    """How flow is stored: h264 (10-bit video), lossless (8-bit video), jpeg (pairs of JPEGs, as denseflow writes)."""
    bound: float = 20.0
    """Flow is clipped to plus or minus this many pixels."""
    flow_quality: int | None = None
    """Constant rate factor of h264 (lower is better), or JPEG quality. None: 15 for h264, 95 for jpeg."""
    rgb_codec: RGBCodec = "h264"
    """How RGB frames are stored: 8-bit 4:2:0 video."""
    rgb_quality: int | None = None
    """Constant rate factor of the RGB video (lower is better). None: 20 for h264, 26 for av1."""
    keyframe_interval: int = 16
    """Largest distance between keyframes, in frames; reading a window decodes up to this many frames more."""
    fast_decode: bool = False
    """H.264 without arithmetic coding (CABAC): RGB decodes in two thirds of the time at a twelfth more bytes, flow in
    three quarters at a third more. The frames stay as good."""

    def __post_init__(self) -> None:
        for flag, codec, allowed in (
            ("--codec", self.flow_codec, _FLOW_FORMATS),
            ("--rgb-codec", self.rgb_codec, _RGB_FORMATS),
        ):
            if codec not in allowed:
                raise SettingsError(f"{flag} is {codec!r}: choose one of {', '.join(allowed)}")
        for flag, quality, codec in (
            ("--flow-quality", self.flow_quality, self.flow_codec),
            ("--rgb-quality", self.rgb_quality, self.rgb_codec),
        ):
            if quality is not None and not 0 <= quality <= _WORST_QUALITY[codec]:
                raise SettingsError(
                    f"{flag} is {quality}: give 0 to {_WORST_QUALITY[codec]} for {codec}, or leave it out"
                )
        if not 0 < self.bound < float("inf"):
            raise SettingsError(f"--bound is {self.bound}: give a positive number of pixels (the field uses 20)")
        if not 1 <= self.keyframe_interval <= MAX_KEYFRAME_INTERVAL:
            raise SettingsError(
                f"--keyframe-interval is {self.keyframe_interval}: give 1 to {MAX_KEYFRAME_INTERVAL} frames"
            )
        if self.fast_decode and self.flow_codec == "jpeg" and self.rgb_codec == "av1":
            raise SettingsError("--fast-decode is of H.264, and neither --codec jpeg nor --rgb-codec av1 is that")

    @property
    def flow_scale(self) -> FlowScale:
        """Bound, levels and zero code that the flow codec stands for."""
        flow_format = _FLOW_FORMATS[self.flow_codec]
        return FlowScale(bound=self.bound, levels=flow_format.levels, zero_code=flow_format.zero_code)

    @property
    def resolved_flow_quality(self) -> int:
        """The flow quality in force: the one given or the codec's default."""
        return _FLOW_FORMATS[self.flow_codec].quality if self.flow_quality is None else self.flow_quality

    @property
    def resolved_rgb_quality(self) -> int:
        """The constant rate factor of RGB in force: the one given or the codec's default."""
        return _RGB_QUALITY[self.rgb_codec] if self.rgb_quality is None else self.rgb_quality

    @property
    def flow_extension(self) -> str:
        """Name of a WebDataset member of this codec: flow.mp4 or flow.zip."""
        return _FLOW_FORMATS[self.flow_codec].extension

    def describe_formats(self) -> dict[str, dict[str, Any]]:
        """What the names of the codecs stand for in this version: encoders, their options, the flow's levels."""
        flow = replace(_FLOW_FORMATS[self.flow_codec], video=self.flow_video_format)
        return {"flow": asdict(flow), "rgb": asdict(self.as_stored(_RGB_FORMATS[self.rgb_codec]))}

    @property
    def flow_video_format(self) -> VideoFormat | None:
        """How flow is encoded; None where that is pairs of JPEGs."""
        video_format = _FLOW_FORMATS[self.flow_codec].video
        return video_format and self.as_stored(video_format)

    def as_stored(self, video_format: VideoFormat) -> VideoFormat:
        """The format, quicker to decode where that is asked for."""
        if not self.fast_decode or video_format.encoder != "libx264":
            return video_format
        options = {**video_format.options}
        options["x264-params"] += ":cabac=0"
        return replace(video_format, options=options)

    def flow_convention(self) -> dict[str, str | int | float]:
        """What a reader must know to turn the stored codes into pixels of motion."""
        flow_format = _FLOW_FORMATS[self.flow_codec]
        return {
            "codec": self.flow_codec,
            "bound_px": float(self.bound),
            "levels": flow_format.levels,
            "zero_code": flow_format.zero_code,
            "layout": flow_format.layout,
            "direction": "t_to_t+1",
            "unit": "px_per_frame",
        }


def check_convention(found: Convention, expected: Convention | None = None) -> None:
    """Raise ConventionError unless this module reads `found` and, where given, every entry of `expected` is in it."""
    codec, bound = found.get("codec"), found.get("bound_px")
    if codec not in _FLOW_FORMATS or not isinstance(bound, int | float) or not 0 < bound < float("inf"):
        raise ConventionError(
            f"stored flow has codec {codec!r} and bound_px {bound!r}, this reader knows the codecs "
            f"{', '.join(_FLOW_FORMATS)} and positive bounds: read it with the version that wrote it, or extract again"
        )
    _check_equal(found, CodecSettings(flow_codec=cast(FlowCodec, codec), bound=bound).flow_convention())
    if expected is not None:
        _check_equal({name: found[name] for name in expected if name in found}, expected)


def _check_equal(found: Convention, expected: Convention) -> None:
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if differing:
        stored, wanted = ({name: side.get(name) for name in differing} for side in (found, expected))
        raise ConventionError(
            f"stored flow has {stored}, this reader expects {wanted}: let it expect what is stored, or extract again"
        )


def scale_of(convention: Convention) -> FlowScale:
    """The scale that a checked convention describes."""
    return FlowScale(
        bound=float(convention["bound_px"]), levels=int(convention["levels"]), zero_code=float(convention["zero_code"])
    )


def quantise(flow: npt.NDArray[np.floating], scale: FlowScale) -> Codes:
    """Integer codes of flow in px, same shape, uint8 or uint16; ties round to even as in OpenCV's cvRound.

    Raises ValueError where flow is not finite.
    """
    if not np.isfinite(flow).all():
        raise ValueError(
            "flow holds NaN or infinity; it must be finite to be stored, so look at the kernel that made it"
        )
    codes = np.clip(flow, -scale.bound, scale.bound).astype(np.float32, copy=False)
    codes *= np.float32(1 / scale.step)
    codes += np.float32(scale.zero_code)
    return np.rint(codes, out=codes).astype(scale.dtype)


def dequantise(levels: Codes, scale: FlowScale) -> npt.NDArray[np.float32]:
    """Flow in px of integer codes, same shape, float32, clipped to +-bound: lossy codecs overshoot."""
    flow = levels.astype(np.float32)
    flow -= np.float32(scale.zero_code)
    flow *= np.float32(scale.step)
    return np.clip(flow, -scale.bound, scale.bound, out=flow)


def negate(levels: Codes, scale: FlowScale) -> Codes:
    """The codes of the opposite flow, same shape and dtype."""
    # Modulo what the type holds, as it computes anyway: twice the zero code of `lossless`, 256, is no uint8.
    twice_zero = round(2 * scale.zero_code) % (np.iinfo(levels.dtype).max + 1)
    return np.subtract(twice_zero, levels, dtype=levels.dtype)


def stack_components(levels: Codes) -> Codes:
    """Codes (..., H, W, 2) as the grey image (..., 2H, W) that is stored, u over v."""
    return np.concatenate([levels[..., 0], levels[..., 1]], axis=-2)


def split_components(image: Codes) -> Codes:
    """The grey image (..., 2H, W) as codes (..., H, W, 2): a view, both components stay contiguous planes."""
    *outer, double_height, width = image.shape
    return np.moveaxis(image.reshape(*outer, 2, double_height // 2, width), -3, -1)


@dataclass(frozen=True)
class FlowCounts:
    """What is said of a stored frame of flow beside its codes.

    length   sum of the lengths of its vectors, in codes
    clipped  number of components stored as -bound or +bound
    """

    length: float
    clipped: int


def count_levels(image: Codes, scale: FlowScale) -> FlowCounts:
    """The counts of one stacked image (2H, W) of codes."""
    u, v = np.split(image.astype(np.float32) - np.float32(scale.zero_code), 2)
    lowest, highest = scale.lowest, scale.lowest + scale.levels - 1
    # Not cv2.magnitude and cv2.sumElems: their last digits depend on where in memory the arrays lie.
    return FlowCounts(
        length=float(np.sqrt(u * u + v * v).sum(dtype=np.float64)),
        clipped=int(np.count_nonzero(image <= lowest) + np.count_nonzero(image >= highest)),
    )


class FlowEncoder:
    """Encodes the flow of one video frame by frame and counts what was written. Sizes are even, 2x2 to 4K."""

    def __init__(self, settings: CodecSettings, *, height: int, width: int, fps: float = 25.0) -> None:
        _check_even(height, width)
        self.scale = settings.flow_scale
        self._size = (height, width)
        self._magnitude_sum = 0.0
        self._num_clipped = 0
        self._writer = _open_flow_writer(settings, height=height, width=width, fps=fps)

    def write(self, flow: npt.NDArray[np.floating]) -> None:
        """Append flow (H, W, 2) in px from one frame to the next."""
        self.write_levels(stack_components(quantise(flow, self.scale)))

    def write_levels(self, image: Codes, counts: FlowCounts | None = None) -> None:
        """Append one stacked image (2H, W) of codes, as `stack_components(quantise(flow, scale))` makes it.

        counts: of this image, where they are known already.
        """
        height, width = self._size
        if image.shape != (2 * height, width) or image.dtype != self.scale.dtype:
            wanted = f"{(2 * height, width)} {self.scale.dtype.__name__}"
            raise ValueError(f"levels are {image.shape} {image.dtype}; this encoder takes {wanted}")
        counts = counts or count_levels(image, self.scale)
        self._magnitude_sum += self.scale.step * counts.length
        self._num_clipped += counts.clipped
        self._writer.write_grey(image)

    @property
    def num_frames(self) -> int:
        """Flow frames written so far."""
        return self._writer.num_frames

    @property
    def mean_magnitude(self) -> float:
        """Mean length of the stored vectors in px; 0 before the first frame."""
        return self._magnitude_sum / max(1, self.num_frames * self._size[0] * self._size[1])

    @property
    def clipped_share(self) -> float:
        """Share of components that are stored as -bound or +bound; 0 before the first frame."""
        return self._num_clipped / max(1, 2 * self.num_frames * self._size[0] * self._size[1])

    def close(self) -> bytes:
        """The file's bytes; b"" where a video had no second frame and so no flow."""
        return self._writer.close()


class RGBEncoder:
    """Encodes the RGB frames of one video, 4:2:0 with BT.601 colours, frame by frame.

    Sizes are even, 2x2 to 4K; 2 px wide or high, SVT-AV1 gives up and `av1` stores H.264.
    """

    def __init__(self, settings: CodecSettings, *, height: int, width: int, fps: float = 25.0) -> None:
        _check_even(height, width)
        video_format = _RGB_FORMATS["h264" if min(height, width) < SVT_AV1_MIN_SIDE else settings.rgb_codec]
        self._shape = (height, width, 3)
        self._writer = VideoWriter(
            settings.as_stored(video_format),
            height=height,
            width=width,
            fps=fps,
            crf=settings.resolved_rgb_quality,
            keyframe_interval=settings.keyframe_interval,
        )

    def write(self, frame: npt.NDArray[np.uint8]) -> None:
        """Append a frame (H, W, 3) uint8."""
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(f"frame is {frame.shape} {frame.dtype}; this encoder takes {self._shape} uint8")
        self._writer.write_rgb(frame)

    @property
    def num_frames(self) -> int:
        """Frames written so far."""
        return self._writer.num_frames

    def close(self) -> bytes:
        """The mp4 file's bytes; b"" where no frame was written."""
        return self._writer.close()


class _JPEGPairWriter:
    """Two grey JPEGs a frame, named as denseflow names them, in an uncompressed zip: any frame is one seek away."""

    def __init__(self, quality: int) -> None:
        self.num_frames = 0
        self._quality = quality
        self._buffer = io.BytesIO()
        self._zip = zipfile.ZipFile(self._buffer, "w", zipfile.ZIP_STORED)

    def write_grey(self, image: Codes) -> None:
        for component, levels in zip("xy", np.split(image, 2), strict=True):
            _, jpeg = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, self._quality])
            member = zipfile.ZipInfo(_jpeg_name(component, self.num_frames), ZIP_DATE)
            member.create_system = 3  # Unix, wherever this runs
            self._zip.writestr(member, jpeg.tobytes())
        self.num_frames += 1

    def close(self) -> bytes:
        self._zip.close()
        return self._buffer.getvalue() if self.num_frames else b""


def _jpeg_name(component: str, index: int) -> str:
    return f"flow_{component}_{index:05d}.jpg"


def _check_even(height: int, width: int) -> None:
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(
            f"frames are {height}x{width}; both sides must be even and at least 2, so resize or crop first"
        )


def _open_flow_writer(settings: CodecSettings, *, height: int, width: int, fps: float) -> VideoWriter | _JPEGPairWriter:
    video_format = settings.flow_video_format
    if video_format is None:
        return _JPEGPairWriter(settings.resolved_flow_quality)
    return VideoWriter(
        video_format,
        height=2 * height,
        width=width,
        fps=fps,
        crf=settings.resolved_flow_quality,
        keyframe_interval=settings.keyframe_interval,
    )


def decode_codes(
    data: bytes, convention: Convention, *, start: int = 0, stop: int | None = None, size: tuple[int, int] = (0, 0)
) -> Codes:
    """Codes (n, H, W, 2) of frames start to stop, uint8 or uint16: a view, both components stay contiguous planes.

    A stop past the end is the end; `size` (H, W) is what an empty blob, the flow of a one-frame video, decodes to.
    Raises ConventionError where the convention is not one this module reads, ValueError unless 0 <= start <= stop.
    """
    check_convention(convention)
    _check_window(start, stop)
    read_window = _read_jpeg_window if convention["codec"] == "jpeg" else _read_video_window
    images = list(read_window(data, start, stop))
    dtype = scale_of(convention).dtype
    if not images:
        return np.zeros((0, *size, 2), dtype)
    if images[0].dtype != dtype:
        raise ConventionError(f"stored codes are {images[0].dtype}, the convention says {dtype.__name__}: {convention}")
    return split_components(np.stack(images))


def decode_flow(
    data: bytes, convention: Convention, *, start: int = 0, stop: int | None = None, size: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.float32]:
    """Flow (n, H, W, 2) float32 in px, clipped at +-bound, of frames start to stop; see `decode_codes`."""
    levels = decode_codes(data, convention, start=start, stop=stop, size=size)
    return dequantise(levels, scale_of(convention))


def decode_rgb(
    data: bytes, *, start: int = 0, stop: int | None = None, size: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.uint8]:
    """Frames (n, H, W, 3) uint8 from start to stop, past the end meaning the end; `size` (H, W): of an empty blob."""
    _check_window(start, stop)
    frames = [read_rgb(frame) for frame in _read_window(data, start, stop)]
    return np.stack(frames) if frames else np.zeros((0, *size, 3), np.uint8)


def decode_rgb_frames(
    data: bytes, frames: Sequence[int], area: Area | None = None, *, mirrored: bool = False
) -> npt.NDArray[np.uint8]:
    """RGB (n, H, W, 3) uint8 of these frames only, ascending and at least one, and of them only of an area.

    `mirrored`: left to right. Raises ValueError where one of the frames is not there.
    """
    images = (read_rgb(frame, area) for frame in _read_chosen(data, frames))
    return _collect(map(_flip, images) if mirrored else images, frames, lambda image: image.shape, np.copyto)


def decode_code_frames(
    data: bytes, convention: Convention, frames: Sequence[int], area: Area | None = None, *, mirrored: bool = False
) -> Codes:
    """Codes (n, H, W, 2) uint8 or uint16 of these frames only, as `decode_rgb_frames` gives RGB; see `dequantise`.

    Mirrored flow has its u negated. Raises ConventionError where the convention is not one this module reads.
    """
    check_convention(convention)
    scale = scale_of(convention)
    if convention["codec"] == "jpeg":
        images = _read_jpegs(data, frames)
    else:
        images = (read_grey(frame) for frame in _read_chosen(data, frames))
    parts = (_cut_components(image, scale, area, mirrored) for image in images)
    codes = _collect(parts, frames, lambda part: (*part[0].shape, 2), _merge_into)
    if codes.dtype != scale.dtype:
        raise ConventionError(f"stored codes are {codes.dtype}, which the convention is not: {convention}")
    return codes


def _collect(
    images: Iterator[T],
    frames: Sequence[int],
    shape: Callable[[T], tuple[int, ...]],
    write: Callable[[npt.NDArray[Any], T], object],
) -> npt.NDArray[Any]:
    """The images as one array, of which `write` fills the part of each."""
    found, count = None, 0
    for count, image in enumerate(images, start=1):
        if found is None:
            found = np.empty((len(frames), *shape(image)), np.asarray(image[0]).dtype)
        write(found[count - 1], image)
    if found is None or count < len(frames):
        raise ValueError(f"{count} of {format_count(len(frames), 'frame')} from frame {frames[0]} on could be decoded")
    return found


def _merge_into(target: Codes, parts: list[Codes]) -> None:
    """Interleave u and v where they belong: a copy more would cost as much as a fifth of decoding the frame."""
    if parts[0].shape != target.shape[:2] or parts[0].dtype != target.dtype:
        raise ValueError("a stored frame has another size than the first")  # OpenCV would write it elsewhere
    cv2.merge(parts, dst=target)


def _cut_components(image: Codes, scale: FlowScale, area: Area | None, mirrored: bool) -> list[Codes]:
    """u and v (H, W) of a stored frame (2H, W), or of an area of it."""
    u, v = image[: len(image) // 2], image[len(image) // 2 :]  # np.split takes as long as flipping both
    if area is not None:
        u, v = u[area.slices], v[area.slices]
    return [negate(_flip(u), scale), _flip(v)] if mirrored else [u, v]


def _flip(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return cv2.flip(image, 1)


def _read_chosen(data: bytes, frames: Sequence[int]) -> Iterator[av.VideoFrame]:
    wanted, last = set(frames), frames[-1]
    for index, frame in read_frames(data, start=frames[0]) if data else ():
        if index in wanted:
            yield frame
        if index >= last:
            return


def _check_window(start: int, stop: int | None) -> None:
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start is {start} and stop {stop}; a window needs 0 <= start <= stop")


def _read_window(data: bytes, start: int, stop: int | None) -> Iterator[av.VideoFrame]:
    if not data or stop == start:
        return
    for index, frame in read_frames(data, start=start):
        if index >= start:
            yield frame
        if stop is not None and index >= stop - 1:
            return


def _read_video_window(data: bytes, start: int, stop: int | None) -> Iterator[Codes]:
    return (read_grey(frame) for frame in _read_window(data, start, stop))


def _read_jpeg_window(data: bytes, start: int, stop: int | None) -> Iterator[Codes]:
    return _read_jpegs(data, slice(start, stop))


def _read_jpegs(data: bytes, chosen: Sequence[int] | slice) -> Iterator[Codes]:
    """The stored frames of a zip of JPEGs; those that it does not hold are left out."""
    if not data:
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        there = range(len(archive.namelist()) // 2)
        for index in there[chosen] if isinstance(chosen, slice) else [index for index in chosen if index in there]:
            pair = [np.frombuffer(archive.read(_jpeg_name(component, index)), np.uint8) for component in "xy"]
            yield np.concatenate([cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE) for jpeg in pair])


@dataclass(frozen=True, kw_only=True)
class FlowError:
    """Absolute error in px of stored flow components against the clipped float flow."""

    mean: float
    rms: float
    p999: float
    max: float


def flow_error(flow: npt.NDArray[np.floating], decoded: npt.NDArray[np.floating], bound: float) -> FlowError:
    """Error of decoded flow against flow clipped at +-bound, both of one shape and not empty, over all components."""
    if flow.shape != decoded.shape or not flow.size:
        raise ValueError(
            f"flow is {flow.shape} and decoded flow {decoded.shape}; give two arrays of one shape, not empty"
        )
    error = np.abs(decoded - np.clip(flow, -bound, bound))
    return FlowError(
        mean=float(error.mean(dtype=np.float64)),
        rms=float(np.sqrt(np.square(error).mean(dtype=np.float64))),
        p999=float(np.quantile(error, 0.999)),
        max=float(error.max()),
    )
