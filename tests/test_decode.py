"""Frames at a fixed rate from real files: made here with PyAV, and the ones other projects test their decoders with."""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from pipelines.errors import KINDS, SettingsError, VideoError
from pipelines.media.codec import CodecSettings, RGBEncoder, decode_rgb
from pipelines.media.decode import DecodeSettings, VideoInfo, decode, resample, resolve_span
from pipelines.media.decoder_process import Decoder
from pipelines.media.mp4 import ordinary_priority
from pipelines.media.resize import RGBFrame, output_size

SMALL = DecodeSettings(short_side=64)


def read(path: Path, settings: DecodeSettings = SMALL, **span: float | None) -> tuple[list[RGBFrame], VideoInfo]:
    frames: list[RGBFrame] = []
    decoding = decode(path, settings=settings, **span)
    while True:
        try:
            frames.append(next(decoding))
        except StopIteration as stop:
            return frames, stop.value


def fail(path: Path, settings: DecodeSettings = SMALL, **span: float | None) -> VideoError:
    with pytest.raises(VideoError) as caught:
        read(path, settings, **span)
    return caught.value


def write_video(
    path: Path,
    *,
    frames: int = 50,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: list[int] | None = None,
    container: dict[str, str] | None = None,
    rate: int | Fraction = 25,
    **options: str,
) -> Path:
    """A bar one pixel further every frame, brightness 4 levels up; size is (width, height), times in ms or by rate."""
    with ordinary_priority(), av.open(str(path), "w", container_options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        tick = Fraction(1, 1000) if times else 1 / Fraction(rate)
        stream.codec_context.time_base = tick
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(bars(index, size))
            frame.pts, frame.time_base = (times[index] if times else index), tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def bars(index: int, size: tuple[int, int]) -> RGBFrame:
    width, height = size
    picture = np.full((height, width, 3), 4 * index % 248, np.uint8)
    picture[: height // 4, index % width] = 255
    return picture


def indices(frames: list[RGBFrame]) -> list[int]:
    """Which of `bars` each frame shows, by its brightness."""
    return [round(float(frame[len(frame) // 2 :].mean()) / 4) for frame in frames]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds with B-frames and a keyframe every 10 frames."""
    return write_video(tmp_path_factory.mktemp("video") / "bars.mp4", g="10", bf="3", crf="10")


# --- sizes, spans, slots ---


@pytest.mark.parametrize(
    ("start", "end", "duration", "expected"),
    [
        (None, None, 300.0, None),
        (17, 27, 300.0, (17, 27)),
        (17, 27, None, (17, 27)),
        (17, 27, 10.03, None),  # trimmed: the span starts beyond the end
        (5, 15, 10.9, None),  # trimmed: no longer than the span, give or take a second
        (5, 15, 11.1, (5, 15)),
        (0, 10, 10.0, None),
        (None, 10, 60.0, (0, 10)),
        (50, None, 60.0, (50, None)),
        (55, 65, 60.0, (55, 65)),  # untrimmed, and ends within the span
    ],
)
def test_resolve_span(
    start: float | None, end: float | None, duration: float | None, expected: tuple[float, float | None] | None
) -> None:
    assert resolve_span(start, end, duration) == expected


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 5), (6, 5), (math.nan, 5), (1, math.nan)])
def test_resolve_span_refuses_empty_spans(start: float, end: float) -> None:
    with pytest.raises(VideoError) as caught:
        resolve_span(start, end, 60.0)
    assert caught.value.kind == "empty_span"


def slots(times: list[float], *, fps: int, last: float, limit: int | None = None) -> list[int]:
    """The indices of the frames that fill the slots."""
    ends = [*times[1:], times[-1] + last]
    timed = [(Fraction(t), Fraction(e), i) for i, (t, e) in enumerate(zip(times, ends, strict=True))]
    return [i for i, count in resample(timed, fps=Fraction(fps), slots=limit) for _ in range(count)]


def test_resample_repeats_over_gaps_and_keeps_the_last_of_a_collision() -> None:
    assert slots([0, 1, 1.25, 2, 5], fps=1, last=1) == [0, 2, 3, 3, 3, 4]


def test_resample_rounds_halves_up() -> None:
    assert slots([0, 0.5, 1.5], fps=1, last=0.5) == [0, 1]


def test_resample_fills_the_span_and_no_more() -> None:
    assert slots([-1, -0.75, 0.5, 1, 2, 3], fps=1, last=1, limit=2) == [1, 3]
    assert slots([0.5, 1, 2], fps=1, last=1, limit=2) == [0, 1]
    assert slots([-3, -2], fps=1, last=1, limit=2) == []


def test_resample_gives_every_video_a_frame() -> None:
    assert slots([0], fps=25, last=0.001) == [0]


def filter_indices(times: list[int], last: int, fps: str) -> list[int]:
    """What FFmpeg's own fps filter makes of frames at these milliseconds."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=16, height=16, format="gray", time_base=Fraction(1, 1000))
    rate, sink = graph.add("fps", f"fps={fps}:round=near"), graph.add("buffersink")
    graph.link_nodes(source, rate, sink).configure()
    ends = [*times[1:], times[-1] + last]
    for index, (time, end) in enumerate(zip(times, ends, strict=True)):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), index, np.uint8), format="gray")
        frame.pts, frame.duration, frame.time_base = time, end - time, Fraction(1, 1000)
        graph.push(frame)
    graph.push(None)
    found = []
    while True:
        try:
            found.append(int(graph.pull().to_ndarray()[0, 0]))
        except (av.error.BlockingIOError, av.error.EOFError):
            return found


@pytest.mark.parametrize("fps", ["25", "30000/1001", "12", "60"])
@pytest.mark.parametrize("seed", range(8))
def test_resample_is_ffmpegs_fps_filter(fps: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    gaps = random.choice([1, 7, 20, 33, 34, 40, 41, 100, 500], 99) if seed else np.full(99, 20)
    times = [0, *np.cumsum(gaps).tolist()]
    timed = [
        (Fraction(t, 1000), Fraction(e, 1000), i)
        for i, (t, e) in enumerate(itertools.pairwise([*times, times[-1] + 90]))
    ]
    ours = [i for i, count in resample(timed, fps=Fraction(fps), slots=None) for _ in range(count)]
    assert ours == filter_indices(times, 90, fps)


# --- settings ---


@pytest.mark.parametrize(
    "change",
    [
        *({"fps": 0}, {"fps": math.nan}, {"fps": 0.0004}, {"fps": math.inf}, {"fps": "Native"}),
        *({"frame_size": size} for size in ("340", "341x256", "340x255", "0x0", "2050x1024", "18x2", "-2x-2", "٣٤x٣٤")),
        *({"short_side": 255}, {"short_side": 4098}, {"max_frames": 0}),
        *({"timeout_s": 0}, {"timeout_s": math.inf}, {"timeout_s": math.nan}, {"timeout_s": 1e300}),
        *({"max_gap_s": 0}, {"max_gap_s": math.inf}),
        *({"memory_limit_mb": 9}, {"memory_limit_mb": 1 << 60}, {"cpu_limit_s": 0}, {"cpu_limit_s": 1 << 60}),
    ],
)
def test_settings_name_what_is_wrong(change: dict[str, float]) -> None:
    flags = {"max_gap_s": "max-gap", "timeout_s": "decode-timeout"}
    flags |= {"memory_limit_mb": "decode-memory", "cpu_limit_s": "decode-cpu-limit"}
    ((name, value),) = change.items()
    with pytest.raises(
        SettingsError, match=f"^--{flags.get(name, name.replace('_', '-'))} is {re.escape(str(value))}: "
    ):
        DecodeSettings(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "extreme",
    [
        *({"fps": 0.01}, {"fps": 1000}, {"short_side": 2}, {"short_side": 2048}),
        *({"fps": "native"}, {"frame_size": "2x2"}, {"frame_size": "16x2"}, {"frame_size": "2048x2048"}),
        *({"timeout_s": 86_400, "max_gap_s": 86_400}, {"timeout_s": 0.2, "cpu_limit_s": 1, "memory_limit_mb": 512}),
        {"cpu_limit_s": 1 << 30, "memory_limit_mb": 1 << 30},
        {"cpu_limit_s": None, "memory_limit_mb": None},
    ],
)
def test_what_settings_allow_decodes_and_encodes(tmp_path: Path, extreme: dict[str, float]) -> None:
    settings = DecodeSettings(**{"short_side": 64, **extreme})  # type: ignore[arg-type]
    path = write_video(tmp_path / "video.mp4", frames=3, size=(16, 16))
    with Decoder(replace(settings, timeout_s=max(10, settings.timeout_s))) as decoder:
        decoding = decoder.frames(path)
        frames = list(decoding)
    assert decoding.expected_fps is not None
    height, width = frames[0].shape[:2]
    encoder = RGBEncoder(CodecSettings(), height=height, width=width, fps=decoding.expected_fps)
    for frame in frames[:2]:
        encoder.write(frame)
    assert len(decode_rgb(encoder.close())) == min(2, len(frames))


# --- whole videos ---


def test_frames_at_25_fps_are_the_sources(video: Path) -> None:
    frames, info = read(video)
    assert indices(frames) == list(range(50))
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((64, 96, 3), "uint8")}
    assert (info.frames, info.source_frames, info.damaged_frames, info.partial) == (50, 50, 0, False)
    assert (info.codec, info.pixel_format, info.timing, info.trimmed) == ("h264", "yuv420p", "time", False)
    assert (info.source_height, info.source_width, info.height, info.width) == (64, 96, 64, 96)
    assert info.duration == 2.0


@pytest.mark.parametrize(("fps", "expected"), [(50.0, 100), (12.5, 25), (30.0, 60), (29.97, 60), (1.0, 2)])
def test_other_rates(video: Path, fps: float, expected: int) -> None:
    frames, _ = read(video, DecodeSettings(short_side=64, fps=fps))
    assert len(frames) == expected
    assert indices(frames) == sorted(indices(frames))


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "vfr.mkv", frames=6, times=[0, 40, 50, 200, 240, 280], crf="10")
    assert indices(read(path)[0])[:8] == [0, 2, 2, 2, 2, 3, 4, 5]


# --- at the file's own rate ---

NATIVE = DecodeSettings(fps="native", short_side=64)


def pictures(path: Path) -> int:
    """How many pictures PyAV decodes."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("rate", [15, 24, 30, Fraction(30000, 1001), 60])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_at_its_own_rate_a_file_gives_each_picture_once(tmp_path: Path, rate: int | Fraction, suffix: str) -> None:
    path = write_video(tmp_path / f"video.{suffix}", frames=40, rate=rate, bf="0" if suffix == "avi" else "2", crf="10")
    frames, info = read(path, NATIVE)
    assert indices(frames) == list(range(pictures(path))) == list(range(40))
    assert (info.frames, info.source_frames, info.damaged_frames, info.partial) == (40, 40, 0, False)
    assert info.fps == info.source_fps == pytest.approx(float(rate), rel=1e-3)
    assert info.duration == pytest.approx(40 / float(rate), rel=1e-3)


def test_at_its_own_rate_nothing_of_a_variable_rate_is_repeated_or_left_out(tmp_path: Path) -> None:
    times = [0, 40, 50, 200, 240, 280, 700]
    frames, info = read(write_video(tmp_path / "vfr.mkv", frames=7, times=times, crf="10"), NATIVE)
    assert indices(frames) == list(range(7))
    assert info.fps == pytest.approx(6 / 0.7, rel=1e-3)


def test_at_its_own_rate_a_pause_is_no_reason_to_refuse_a_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "pause.mkv", frames=4, times=[0, 40, 5000, 5040], crf="10")
    assert fail(path, replace(SMALL, max_gap_s=1)).kind == "long_gap"
    assert indices(read(path, replace(NATIVE, max_gap_s=1))[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.4, 0.9), (0.42, 0.58), (0.51, 0.52), (0.9, None)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_span_at_its_own_rate_is_of_the_whole(tmp_path: Path, suffix: str, start: float, end: float | None) -> None:
    """The picture that is on the screen at the start, and those that come before the end."""
    path = write_video(tmp_path / f"video.{suffix}", frames=60, rate=20, bf="2", g="10", crf="10")
    frames, info = read(path, NATIVE, start=start, end=end)
    expected = [n for n in range(60) if (n + 1) / 20 > start + 1e-9 and n / 20 < (end or 3) - 1e-9]
    assert indices(frames) == expected
    assert info.trimmed
    assert info.fps == pytest.approx(20, rel=1e-3)
    assert info.duration == pytest.approx(len(expected) / 20, rel=1e-3)


def test_at_its_own_rate_max_frames_counts_pictures(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", frames=120, rate=60, crf="10")
    assert len(read(path, replace(NATIVE, max_frames=120))[0]) == 120
    for limit in (119, 20):
        error = fail(path, replace(NATIVE, max_frames=limit))
        assert (error.kind, f"the limit is {limit} frames)" in str(error)) == ("too_long", True)
    assert len(read(path, replace(NATIVE, max_frames=31), start=0, end=0.5)[0]) == 30


def test_at_its_own_rate_a_damaged_file_is_judged_as_at_another(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.ts", frames=200, rate=30, g="10", crf="10")
    data = path.read_bytes()
    for name, kept, kind in (("ends.ts", 0.97, None), ("noise.ts", 0.3, "corrupt")):
        noise = np.random.default_rng(0).integers(0, 256, len(data) - int(kept * len(data)), np.uint8).tobytes()
        (tmp_path / name).write_bytes(data[: int(kept * len(data))] + (b"" if kind is None else noise))
        verdicts = []
        for settings in (SMALL, NATIVE):
            try:
                _, info = read(tmp_path / name, settings)
                verdicts.append((info.source_frames, info.damaged_frames, info.partial))
            except VideoError as error:
                verdicts.append((error.kind,))
        assert verdicts[0] == verdicts[1]


def test_frames_of_the_size_that_is_asked_for(tmp_path: Path) -> None:
    """As FFmpeg's scale filter makes them of the same picture, whatever shape it has."""
    path = write_video(tmp_path / "video.mp4", frames=3, size=(176, 144), crf="10")
    frames, info = read(path, DecodeSettings(frame_size="340x256"))
    assert {frame.shape for frame in frames} == {(256, 340, 3)}
    assert (info.source_height, info.source_width, info.height, info.width) == (144, 176, 256, 340)
    assert np.array_equal(frames[1], scale_by_filter(path, 1, 340, 256))


def scale_by_filter(path: Path, index: int, width: int, height: int) -> RGBFrame:
    """A picture of a file through FFmpeg's own scale filter."""
    flags = "bilinear+full_chroma_int+accurate_rnd+bitexact"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        scale = graph.add("scale", f"{width}:{height}:flags={flags}")
        target = graph.add("format", "rgb24")
        graph.link_nodes(graph.add_buffer(template=stream), scale, target, graph.add("buffersink")).configure()
        for _, frame in zip(range(index + 1), container.decode(stream), strict=False):
            graph.push(frame)
            scaled = graph.pull()
    return scaled.to_ndarray()


def test_a_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", frames=2, size=(96, 64), crf="10")
    rotated = with_matrix(path, tmp_path / "shown.mp4", ROTATE_90)
    frames, info = read(rotated, DecodeSettings(frame_size="48x80"))
    assert (frames[0].shape, info.rotation) == ((80, 48, 3), 270)


def test_a_video_that_starts_late_starts_at_its_first_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mkv", frames=5, times=[5003, 5043, 5083, 5123, 5163], crf="10")
    assert indices(read(path)[0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "h264"])
def test_containers(tmp_path: Path, suffix: str) -> None:
    frames, info = read(write_video(tmp_path / f"video.{suffix}", bf="2", crf="10"))
    assert abs(len(frames) - 50) <= 1
    assert indices(frames) == sorted(indices(frames))
    assert info.timing == ("order" if suffix in ("avi", "h264") else "time")


@pytest.mark.parametrize(
    ("codec", "suffix", "pixel_format"),
    [
        ("libx264", "mp4", "yuv444p"),
        ("libx264", "mkv", "yuv420p10le"),
        ("libx265", "mp4", "yuv420p"),
        ("libvpx", "webm", "yuv420p"),
        ("libvpx-vp9", "webm", "yuva420p"),
        ("libsvtav1", "mkv", "yuv420p10le"),
        ("mpeg2video", "mpg", "yuv420p"),
        ("mpeg4", "avi", "yuv420p"),
        ("mjpeg", "avi", "yuvj420p"),
        ("ffv1", "mkv", "gray"),
        ("ffv1", "mkv", "gbrp16le"),
        ("png", "mov", "rgba"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_codecs_and_pixel_formats(tmp_path: Path, codec: str, suffix: str, pixel_format: str) -> None:
    path = write_video(tmp_path / f"video.{suffix}", frames=25, codec=codec, pixel_format=pixel_format)
    frames, _ = read(path)
    assert abs(len(frames) - 25) <= 1
    assert abs(indices(frames)[12] - 12) <= 2


@pytest.mark.parametrize("size", [(2, 2), (16, 128), (128, 16), (97, 65), (3840, 2160)])
def test_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_video(tmp_path / "video.mkv", frames=3, size=size, codec="ffv1", pixel_format="yuv444p")
    frames, info = read(path)
    assert frames[0].shape == (*output_size(size[1], size[0], 64), 3)
    assert (info.source_width, info.source_height) == size


def test_every_frame_has_the_first_ones_size(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{w}.h264", frames=10, size=(w, h)) for w, h in [(96, 64), (64, 96), (32, 32)]]
    path = tmp_path / "changes.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, info = read(path)
    assert {frame.shape for frame in frames} == {(64, 96, 3)}
    assert info.source_frames == 30


def test_downscaling_does_not_alias(tmp_path: Path) -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    path = tmp_path / "board.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.width = stream.height = 512
        stream.pix_fmt = "gray"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(board.astype(np.uint8), format="gray")))
        output.mux(stream.encode())
    (frame, *_), _ = read(path)
    assert np.abs(frame[4:-4, 4:-4].astype(int) - 128).max() <= 4


# --- display matrix ---

ROTATE_90 = (0, 1, -1, 0)  # a, b, c, d: x' = a·x + c·y, y' = b·x + d·y; clockwise, as phones write it
ROTATE_180 = (-1, 0, 0, -1)
MIRROR = (-1, 0, 0, 1)


def with_matrix(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A copy of an MP4 whose track header has another display matrix."""
    one = 1 << 16
    a, b, c, d = (one * value for value in matrix)
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    data = source.read_bytes()
    at = data.index(identity, data.index(b"tkhd"))
    target.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :])
    return target


@pytest.mark.parametrize(
    ("matrix", "turn", "rotation"),
    [
        (ROTATE_90, lambda picture: np.rot90(picture, -1), 270),
        ((0, -1, 1, 0), np.rot90, 90),
        (ROTATE_180, lambda picture: np.rot90(picture, 2), 180),
        (MIRROR, np.fliplr, 0),
        ((0, 0, 0, 0), lambda picture: picture, 0),
    ],
)
def test_display_matrix(
    video: Path, tmp_path: Path, matrix: tuple[int, int, int, int], turn: Callable[[RGBFrame], RGBFrame], rotation: int
) -> None:
    stored, _ = read(video)
    shown, info = read(with_matrix(video, tmp_path / "shown.mp4", matrix))
    assert all(np.array_equal(turn(a), b) for a, b in zip(stored, shown, strict=True))
    assert info.rotation == rotation


# --- spans ---


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.4, 0.8), (0.52, 0.92), (0.5, 0.94), (1.6, 2.0)])
@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "ts", "h264"])
def test_span(tmp_path: Path, suffix: str, start: float, end: float) -> None:
    path = write_video(tmp_path / f"video.{suffix}", g="10", bf="2", crf="10")
    whole, span = indices(read(path)[0]), indices(read(path, start=start, end=end)[0])
    first = math.ceil(start * 25)
    assert len(span) == round((end - start) * 25)
    assert all(abs(a - b) <= 1 for a, b in zip(span, whole[first:], strict=False))


def test_span_reaches_to_the_end_of_the_file_only(video: Path) -> None:
    frames, info = read(video, start=1.6, end=2.1)
    assert indices(frames) == list(range(40, 50))
    assert info.trimmed


def test_open_span(video: Path) -> None:
    assert indices(read(video, start=1.6)[0]) == list(range(40, 50))
    assert indices(read(video, end=0.4)[0]) == list(range(10))


def test_trimmed_files_are_left_whole(video: Path) -> None:
    frames, info = read(video, start=17, end=27)
    assert len(frames) == 50
    assert not info.trimmed


def test_span_beyond_a_file_of_unknown_length(tmp_path: Path) -> None:
    error = fail(write_video(tmp_path / "video.h264"), start=10, end=11)
    assert error.kind == "empty_span"


# --- broken files ---


def test_limit_of_length(video: Path) -> None:
    error = fail(video, DecodeSettings(short_side=64, max_frames=49))
    assert error.kind == "too_long"
    assert "give the span" in str(error)
    assert len(read(video, DecodeSettings(short_side=64, max_frames=50))[0]) == 50
    assert len(read(video, DecodeSettings(short_side=64, max_frames=10), start=0, end=0.4)[0]) == 10


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    data = write_video(tmp_path / f"whole.{suffix}", frames=200, g="20", container=options).read_bytes()
    path = tmp_path / f"part.{suffix}"
    path.write_bytes(data[: int(0.5 * len(data))])
    error = fail(path)
    assert error.kind == "truncated"
    assert "cut off" in str(error)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_file_that_lacks_a_little_is_kept_and_flagged(tmp_path: Path, suffix: str) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    whole = tmp_path / f"whole.{suffix}"
    write_video(whole, frames=200, size=(320, 240), codec="mjpeg", pixel_format="yuvj420p", container=options)
    data = whole.read_bytes()
    path = tmp_path / f"part.{suffix}"
    path.write_bytes(data[: int(0.95 * len(data))])
    frames, info = read(path)
    assert 180 <= len(frames) < 199
    assert info.partial


def test_corrupt_pictures(tmp_path: Path) -> None:
    path = write_video(tmp_path / "corrupt.ts", frames=100, crf="5")
    path.write_bytes(scribble(path.read_bytes(), changes=300, seed=0))
    assert fail(path).kind == "corrupt"


def scribble(data: bytes, *, changes: int, seed: int) -> bytes:
    """The data with some bytes overwritten at random."""
    random = np.random.default_rng(seed)
    damaged = np.frombuffer(data, np.uint8).copy()
    damaged[random.integers(0, len(data), changes)] = random.integers(0, 256, changes)
    return damaged.tobytes()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "webm", "gif"])
def test_random_damage_yields_frames_or_a_verdict(tmp_path: Path, suffix: str) -> None:
    codec, pixel_format = {"webm": ("libvpx-vp9", "yuv420p"), "gif": ("gif", "rgb8")}.get(
        suffix, ("libx264", "yuv420p")
    )
    data = write_video(tmp_path / f"whole.{suffix}", frames=60, codec=codec, pixel_format=pixel_format).read_bytes()
    outcomes = []
    for seed in range(36):  # benchmarks/fuzz.py has thousands
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(scribble(data, changes=3 ** (seed % 6), seed=seed))
        try:
            outcomes.append(f"{read(path)[1].partial}")
        except VideoError as error:
            outcomes.append(error.kind)
    assert len(set(outcomes)) > 1


def test_encrypted(tmp_path: Path) -> None:
    scheme = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "7" * 32, "encryption_kid": "a" * 32}
    error = fail(write_video(tmp_path / "drm.mp4", container=scheme))
    assert error.kind == "encrypted"


def test_sound_with_a_cover_picture(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as output:
        sound, cover = output.add_stream("aac", rate=16000), output.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.rate = 16000
        output.mux(cover.encode(av.VideoFrame.from_ndarray(bars(9, (32, 32)))))
        output.mux([*cover.encode(), *sound.encode(silence), *sound.encode()])
    error = fail(path)
    assert error.kind == "no_video_stream"
    assert "only audio and a cover picture" in str(error)


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello\n" * 1000)
    (tmp_path / "text.txt").write_text("hello\n" * 1000)
    for name in ["empty.mp4", "text.mp4", "text.txt", "absent.mp4", "."]:
        assert fail(tmp_path / name).kind == "unreadable"


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet><Representation>'
        "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.txt", "list.mpd"])
def test_playlists_open_no_other_file(tmp_path: Path, playlist: str, name: str) -> None:
    write_video(tmp_path / "secret.ts")
    (tmp_path / name).write_text(playlist.format("secret.ts"))
    assert fail(tmp_path / name).kind == "unreadable"


def test_progress_is_reported_while_no_frame_comes(video: Path) -> None:
    calls: list[int] = []
    next(decode(video, settings=SMALL, start=1.5, end=1.6, on_progress=lambda: calls.append(1)))
    assert len(calls) > 10


# --- real files ---

REFUSED = {
    "mp4parse_capi_tests_afconvert-aac-0.5s.mp4": "no_video_stream",
    "mp4parse_capi_tests_bipbop_audioinit.mp4": "no_video_stream",
    "mp4parse_capi_tests_bipbop_nonfragment_header.mp4": "truncated",
    "mp4parse_capi_tests_no_timescale.mp4": "corrupt",
    "mp4parse_capi_tests_opus_audioinit_two_desc.mp4": "no_video_stream",
    "mp4parse_capi_tests_sine-3s-xhe-aac-44khz-mono.mp4": "no_video_stream",
    "mp4parse_tests_amr_nb_1f.3gp": "no_video_stream",
    "mp4parse_tests_bipbop-cenc-audioinit.mp4": "no_video_stream",
    "mp4parse_tests_bipbop_cbcs_audio_init.mp4": "no_video_stream",
    "mp4parse_tests_invalid_userdata.mp4": "truncated",
    "mp4parse_tests_sine-3s-xhe-aac-44khz-mono.mp4": "no_video_stream",
}


def test_every_decoder_file_has_the_right_verdict(shared_data: Path) -> None:
    verdicts = {}
    paths = sorted(path for path in (shared_data / "decoder").rglob("*") if path.is_file())
    for path in paths:
        try:
            frames, info = read(path)
            assert len(frames) == info.frames > 0
        except VideoError as error:
            verdicts[path.name] = error.kind
    assert len(paths) == 52
    assert set(verdicts.values()) <= set(KINDS)
    assert verdicts == REFUSED


def test_rotated_phone_videos_are_upright(shared_data: Path) -> None:
    for degrees, upright in [(0, (64, 114)), (90, (114, 64)), (180, (64, 114)), (270, (114, 64))]:
        path = shared_data / f"decoder/dmlc+decord/tests_test_data_video_{degrees}.mov"
        frames, info = read(path)
        assert frames[0].shape[:2] == upright
        assert info.rotation == -degrees % 360


@pytest.mark.parametrize(
    ("name", "frames", "timing"),
    [
        ("k400__arm_wrestling__demo.mp4", 250, "time"),
        ("k400__flipping_pancake__flipping_a_pancake.mkv", 258, "time"),
        ("ntu__A001_drink_water__S001C001P001R001A001_rgb.avi", 86, "order"),
        ("ucf101__ApplyEyeMakeup__v_ApplyEyeMakeup_g01_c01.avi", 164, "order"),
        ("ucf101__BaseballPitch__v_BaseballPitch_g01_c01.avi", 89, "order"),
    ],
)
def test_real_clips(shared_data: Path, name: str, frames: int, timing: str) -> None:
    _, info = read(shared_data / "clips" / name)
    assert (info.frames, info.timing, info.damaged_frames) == (frames, timing, 0)


def test_an_avi_copied_into_another_container_decodes_alike(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "clips/ucf101__ApplyEyeMakeup__v_ApplyEyeMakeup_g01_c01.avi"
    copy = tmp_path / "copy.mkv"
    with av.open(str(source)) as reading, av.open(str(copy), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size:
                packet.stream = stream
                writing.mux(packet)
    original, copied = read(source)[0], read(copy)[0]
    assert len(original) == len(copied)
    assert all(np.array_equal(a, b) for a, b in zip(original, copied, strict=True))
