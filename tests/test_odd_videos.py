"""Files of kinds that people report. Right is what FFmpeg makes of them: `-vf fps=25`, its stream choice, its `-ss`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream
from test_decode import fail, indices, read, write_video

from pipelines.media.decode import DecodeSettings


def packets_of(path: Path) -> Iterator[Packet]:
    with av.open(str(path)) as container:
        yield from (packet for packet in container.demux(video=0) if packet.size)


def copy(source: Path, target: Path, change: Callable[[Packet], object], **options: str) -> Path:
    """The packets of a video's stream in another file; `change` may move them in time, or return False to leave one."""
    with av.open(str(source)) as reading, av.open(str(target), "w", container_options=options) as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size and change(packet) is not False:
                packet.stream = stream
                writing.mux(packet)
    return target


def later(seconds: float) -> Callable[[Packet], None]:
    def change(packet: Packet) -> None:
        ticks = round(seconds / packet.time_base)
        packet.pts, packet.dts = (packet.pts or 0) + ticks, (packet.dts or 0) + ticks

    return change


def write_streams(path: Path, *streams: dict[str, int], disposed: bool = True) -> Path:
    """Several video streams of `frames` frames, `side` pixels wide, all of one brightness: 8 times their place + 8."""
    with av.open(str(path), "w") as output:
        made = [add_stream(output, facts, disposed) for facts in streams]
        for place, (stream, facts) in enumerate(zip(made, streams, strict=True)):
            for index in range(facts["frames"]):
                picture = np.full((facts["side"], facts["side"], 3), 8 * place + 8, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture)
                frame.pts, frame.time_base = index, Fraction(1, 25)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    return path


def add_stream(output: OutputContainer, facts: dict[str, int], disposed: bool) -> VideoStream:
    stream = output.add_stream("mpeg4", rate=25)
    stream.width = stream.height = facts["side"]
    stream.pix_fmt = "yuv420p"
    stream.bit_rate = 400_000
    if disposed:
        stream.disposition = Disposition.default if facts.get("default") else Disposition(0)
    return stream


def chosen(path: Path) -> int:
    """Place of the stream whose frames came out."""
    return round(float(read(path)[0][0].mean()) / 8) - 1


# --- which stream ---


def test_the_default_stream_wins_over_a_larger_one(tmp_path: Path) -> None:
    small, large = {"side": 32, "frames": 20, "default": 1}, {"side": 64, "frames": 50}
    assert chosen(write_streams(tmp_path / "a.mkv", small, large)) == 0
    assert chosen(write_streams(tmp_path / "b.mkv", large, small)) == 1


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_a_poster_is_not_the_film(tmp_path: Path, suffix: str) -> None:
    film, poster = {"side": 32, "frames": 20}, {"side": 64, "frames": 1, "default": 1}
    assert chosen(write_streams(tmp_path / f"video.{suffix}", poster, film, disposed=suffix == "mkv")) == 1


def test_of_equal_streams_the_largest_is_taken_though_it_lacks_a_frame(tmp_path: Path) -> None:
    small, large = {"side": 32, "frames": 20}, {"side": 64, "frames": 19}
    assert chosen(write_streams(tmp_path / "video.ts", small, large, small)) == 1


def test_a_track_of_data_is_not_the_film(tmp_path: Path) -> None:
    """As cameras write beside the pictures: GoPro's telemetry has the tag gpmd."""
    path = tmp_path / "video.mov"
    with av.open(str(write_video(tmp_path / "plain.mov"))) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        stream.metadata["timecode"] = "01:00:00:00"
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    assert b"tmcd" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"tmcd", b"gpmd"))
    frames, info = read(path)
    assert (indices(frames), info.partial) == (list(range(50)), False)


def test_transparency_is_left_out(tmp_path: Path) -> None:
    """As FFmpeg does: the colours are those stored, whatever is to be seen through them."""
    path = tmp_path / "video.mov"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("prores_ks", rate=25, options={"profile": "4444", "alpha_bits": "16"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuva444p10le"
        picture = np.full((64, 64, 4), (200, 60, 20, 0), np.uint8)
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    frames, info = read(path)
    assert info.pixel_format.startswith("yuva444p")
    assert np.abs(frames[1].astype(int) - (200, 60, 20)).max() <= 4


# --- whole files ---


@pytest.mark.parametrize(("suffix", "codec"), [("flv", "flv"), ("wmv", "wmv2")])
@pytest.mark.parametrize("rate", [5, 10, 25])
def test_packets_without_duration_are_whole(tmp_path: Path, suffix: str, codec: str, rate: int) -> None:
    times = [1000 * i // rate for i in range(rate)]
    path = write_video(tmp_path / f"video.{suffix}", frames=rate, codec=codec, times=times, b="400k")
    frames, info = read(path)
    assert (len(frames), info.partial, info.damaged_frames) == (25, False, 0)


def test_a_copy_that_begins_in_the_midst_is_whole(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.mp4", g="50", bf="0", crf="10")
    cut = copy(source, tmp_path / "cut.mp4", later(-0.5), avoid_negative_ts="disabled")
    frames, info = read(cut)
    assert indices(frames) == list(range(13, 50))
    assert not info.partial


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
def test_a_source_below_the_sampling_rate_says_so_and_repeats(tmp_path: Path, suffix: str) -> None:
    codec = "flv" if suffix == "flv" else "libx264"
    times = [round(1000 * i / 12) for i in range(24)]
    frames, info = read(write_video(tmp_path / f"video.{suffix}", frames=24, codec=codec, times=times))
    assert abs(info.source_fps - 12) < 0.2
    assert sum(np.array_equal(a, b) for a, b in pairwise(frames)) >= 24


# --- pauses ---


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "avi"])
def test_a_pause_is_filled(tmp_path: Path, suffix: str) -> None:
    codec = {"avi": "mpeg4", "flv": "flv"}.get(suffix, "libx264")
    times = [*range(0, 800, 40), *range(14_000, 14_800, 40)]
    path = write_video(tmp_path / f"video.{suffix}", frames=40, codec=codec, times=times, b="400k")
    shown = indices(read(path)[0])
    assert len(shown) == 370
    assert abs(shown[18] - 18) <= 1
    assert all(abs(index - 19) <= 1 for index in shown[20:350])
    assert abs(shown[369] - 39) <= 1


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_a_pause_without_end_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"video.{suffix}", frames=5, codec="mpeg4", times=[0, 40, 80, 6000, 6040])
    error = fail(path, DecodeSettings(short_side=64, max_gap_s=5))
    assert error.kind == "long_gap"
    assert "--max-gap 5" in str(error)
    assert len(read(path, DecodeSettings(short_side=64, max_gap_s=6))[0]) == 152
    assert len(read(path, DecodeSettings(short_side=64, max_gap_s=5), start=0, end=0.12)[0]) == 3


def test_repeats_that_an_avi_leaves_out_are_filled(tmp_path: Path) -> None:
    times = [40 * i for i in range(60) if i % 10 not in (3, 4)]
    path = write_video(tmp_path / "video.avi", frames=48, codec="mjpeg", pixel_format="yuvj420p", times=times)
    expected = [max(k for k, time in enumerate(times) if time <= 40 * i) for i in range(60)]
    assert indices(read(path)[0]) == expected
    assert indices(read(path, start=1.2, end=2.0)[0]) == expected[30:50]


# --- recordings that are joined or cut ---


@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("ts", "mpeg2video"), ("mpg", "mpeg2video")])
@pytest.mark.parametrize("jump", [-3.0, -1.0, 0.0, 100.0])
def test_a_clock_that_jumps(tmp_path: Path, suffix: str, codec: str, jump: float) -> None:
    first = write_video(tmp_path / f"first.{suffix}", codec=codec, g="10", bf="2", b="2M")
    second = copy(first, tmp_path / f"second.{suffix}", later(jump + 4), muxdelay="0")
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(copy(first, tmp_path / f"a.{suffix}", later(4)).read_bytes() + second.read_bytes())
    frames, info = read(path)
    assert abs(len(frames) - 100) <= 1
    assert all(abs(shown - k % 50) <= 1 for k, shown in enumerate(indices(frames)))
    assert (info.damaged_frames, info.partial) == (0, False)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"bf": "2"}),
        ("libx264", {"bf": "3", "x264-params": "open-gop=1"}),
        ("libx265", {"x265-params": "log-level=none:open-gop=1:bframes=3:keyint=25:min-keyint=25"}),
        ("mpeg2video", {"bf": "2", "b": "2M"}),
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.4, 0.55])
def test_a_recording_that_begins_in_the_midst_keeps_its_good_frames(
    tmp_path: Path, codec: str, options: dict[str, str], share: float
) -> None:
    whole = write_video(tmp_path / "whole.ts", frames=100, codec=codec, g="25", **options)
    data, path = whole.read_bytes(), tmp_path / "cut.ts"
    path.write_bytes(data[int(share * len(data) / 188) * 188 :])
    frames, info = read(path)
    expected = [k % 62 for k in range(100)][-len(frames) :]
    assert len(frames) >= 25
    assert all(abs(a - b) <= 1 for a, b in zip(indices(frames), expected, strict=True))
    assert (info.partial, info.damaged_frames) == (True, 0)


def test_raw_motion_jpeg(tmp_path: Path) -> None:
    source = write_video(tmp_path / "video.avi", frames=25, codec="mjpeg", pixel_format="yuvj420p")
    path = tmp_path / "video.mjpeg"
    path.write_bytes(b"".join(bytes(packet) for packet in packets_of(source)))
    assert indices(read(path)[0]) == list(range(25))


# --- interlaced pictures ---


@pytest.mark.parametrize("moving", [True, False])
def test_interlaced_pictures_are_scaled_as_a_whole(tmp_path: Path, moving: bool) -> None:
    """As FFmpeg's scale filter does: half the height averages the fields, and what is only flagged is not combed."""
    path = tmp_path / "video.mkv"
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[:, 32:96] = 255
    if moving:
        picture[1::2] = np.roll(picture[1::2], 16, axis=1)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg2video", rate=25, options={"flags": "+ilme+ildct", "qmin": "1", "b": "20M"})
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        graph = av.filter.Graph()
        source = graph.add_buffer(width=128, height=128, format=av.VideoFormat("yuv420p"), time_base=Fraction(1, 25))
        graph.link_nodes(source, graph.add("setfield", "tff"), graph.add("buffersink")).configure()
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(picture).reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            graph.push(frame)
            output.mux(stream.encode(graph.pull()))
        output.mux(stream.encode())
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    frame = read(path)[0][1].astype(int)
    assert np.abs(np.diff(frame, axis=0)).max() <= 64  # every row alike; fields scaled one by one: 255
    assert abs(frame[:, 20].mean() - (128 if moving else 255)) <= 8


# --- spans ---


def with_silence(source: Path, target: Path, seconds: float, codec: str) -> Path:
    """The packets of a video's stream beside sound that starts at 0, while the pictures start at `seconds`."""
    with av.open(str(source)) as reading, av.open(str(target), "w") as writing:
        video = writing.add_stream_from_template(reading.streams.video[0])
        sound = writing.add_stream(codec, rate=48000)
        for index in range(int(2.5 * 48000 / 1152)):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            silence.rate, silence.pts = 48000, 1152 * index
            writing.mux(sound.encode(silence))
        writing.mux(sound.encode())
        for packet in reading.demux(video=0):
            if packet.size:
                later(seconds)(packet)
                packet.stream = video
                writing.mux(packet)
    return target


def span_sources(folder: Path) -> dict[str, Path]:
    """Kind → file of 50 frames or, where it is cut, 37."""
    h264 = write_video(folder / "h264.mp4", g="10", bf="3", crf="10")
    open_gop = {"g": "10", "bf": "3", "crf": "10", "x264-params": "open-gop=1"}
    xvid = write_video(folder / "xvid.avi", codec="mpeg4", g="10", bf="2", b="2M")
    return {
        "avi": xvid,
        "avi mjpeg": write_video(folder / "m.avi", codec="mjpeg", pixel_format="yuvj420p"),
        "mp4": h264,
        "mp4 open gop": write_video(folder / "open.mp4", **open_gop),
        "mp4 edit list": copy(h264, folder / "cut.mp4", later(-0.5), avoid_negative_ts="disabled"),
        "mkv": write_video(folder / "open.mkv", **open_gop),
        "mkv late": with_silence(h264, folder / "late.mkv", 0.7, "mp2"),
        "ts": write_video(folder / "video.ts", g="10", bf="2", crf="10"),
        "ts late": with_silence(h264, folder / "late.ts", 0.7, "mp2"),
        "flv": write_video(folder / "video.flv", codec="flv", b="2M"),
        "webm": write_video(folder / "video.webm", codec="libvpx", g="10"),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return span_sources(tmp_path_factory.mktemp("spans"))


@pytest.mark.parametrize(
    "kind",
    ["avi", "avi mjpeg", "mp4", "mp4 open gop", "mp4 edit list", "mkv", "mkv late", "ts", "ts late", "flv", "webm"],
)
def test_the_frames_of_any_span_are_those_of_the_whole(sources: dict[str, Path], kind: str) -> None:
    path = sources[kind]
    whole, random = read(path)[0], np.random.default_rng(0)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        late = (video.start_time or 0) * video.time_base - Fraction(container.start_time or 0, av.time_base)
    length = float(late) + len(whole) / 25
    for _ in range(12):
        start = (
            round(float(random.uniform(max(0, float(late) - 0.1), length - 0.6)), 2) + 0.007
        )  # between two ticks of any clock
        end = round(start + float(random.uniform(0.12, 0.5)), 2)
        frames = read(path, start=start, end=end)[0]
        shown = [math.ceil((Fraction(start) - late) * 25 + slot + Fraction(1, 2)) - 1 for slot in range(len(frames))]
        expected = [whole[min(max(0, k), len(whole) - 1)] for k in shown]
        assert len(frames) == math.floor(Fraction(end - start) * 25 + Fraction(1, 2)), (start, end)
        assert all(np.array_equal(a, b) for a, b in zip(frames, expected, strict=True)), (start, end)
