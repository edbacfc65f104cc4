"""Files whose bytes are put together here, for what no muxer at hand writes: packed B-frames, odd edit lists."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
from test_decode import indices, read, write_video
from test_odd_videos import copy, later, packets_of

from pipelines.errors import VideoError
from pipelines.media.decode import VideoInfo

NOT_CODED = b"\x00\x00\x01\xb6\x50\x60"  # a video object plane that says: as the one before


def pack(source: Path, target: Path) -> Path:
    """A copy of an MPEG-4 AVI with packed B-frames, as DivX 5 wrote them: P and B in one chunk, an empty one after."""
    chunks = list(pack_chunks([bytes(packet) for packet in packets_of(source)]))
    with av.open(str(source)) as reading, av.open(str(target), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for index, chunk in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.pts = packet.dts = index
            packet.time_base, packet.stream = stream.time_base, stream
            packet.is_keyframe = index == 0
            writing.mux(packet)
    return target


def pack_chunks(pictures: list[bytes]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    for picture in pictures:
        at = picture.index(b"\x00\x00\x01\xb6") + 4
        if picture[at] >> 6 == 2:  # a B-frame goes into the chunk of the reference before it
            waiting[-1] += picture
            waiting.append(NOT_CODED)
        else:
            yield from waiting
            waiting = [picture]
    yield from waiting


def test_packed_b_frames(tmp_path: Path) -> None:
    source = write_video(tmp_path / "plain.avi", codec="mpeg4", bf="1", g="50", b="2M")
    data = pack(source, tmp_path / "packed.avi").read_bytes()
    encoder = data.index(b"Lavc")
    user_data = b"DivX503b1393p\0"
    (tmp_path / "divx.avi").write_bytes(data[:encoder] + user_data + data[encoder + len(user_data) :])
    frames, info = read(tmp_path / "divx.avi")
    assert indices(frames) == list(range(50))
    assert (info.damaged_frames, info.partial) == (0, False)
    assert indices(read(tmp_path / "divx.avi", start=0.8, end=1.2)[0]) == list(range(20, 30))


def edit(source: Path, target: Path, *edits: tuple[int, int]) -> Path:
    """A copy of an MP4 with another edit list: (length in ms, first unit of the track's clock, -1 for nothing)."""
    data = source.read_bytes()
    at = data.index(b"elst") - 4
    (size,) = struct.unpack_from(">I", data, at)
    entries = b"".join(struct.pack(">IiI", length, start, 1 << 16) for length, start in edits)
    box = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    grown = bytearray(data[:at] + box + data[at + size :])
    for name in (b"moov", b"trak", b"edts"):
        place = grown.index(name) - 4
        (length,) = struct.unpack_from(">I", grown, place)
        struct.pack_into(">I", grown, place, length + len(box) - size)
    target.write_bytes(bytes(grown))
    return target


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Fifty frames with an edit list and the index behind them, and units of the track's clock in a frame."""
    folder = tmp_path_factory.mktemp("edits")
    path = write_video(folder / "source.mp4", bf="2", g="10", crf="10")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return path, round(1 / 25 / stream.time_base)


def shown(listed: tuple[Path, int], tmp_path: Path, *edits: tuple[int, int]) -> tuple[list[int], VideoInfo]:
    """What comes out with edits given in ms and frames."""
    path, frame = listed
    with av.open(str(path)) as container:
        delay = 2 * frame  # B-frames: the first picture is stored two frames late
        assert container.streams.video[0].start_time == 0
    units = [(length, start if start < 0 else delay + start * frame) for length, start in edits]
    frames, info = read(edit(path, tmp_path / "edited.mp4", *units))
    return indices(frames), info


def test_an_edit_list_that_ends_early(listed: tuple[Path, int], tmp_path: Path) -> None:
    frames, info = shown(listed, tmp_path, (1000, 0))
    assert frames == list(range(25))
    assert (info.damaged_frames, info.partial) == (0, False)


def test_an_edit_list_that_begins_late(listed: tuple[Path, int], tmp_path: Path) -> None:
    frames, info = shown(listed, tmp_path, (1000, 13))
    assert frames == list(range(13, 38))
    assert not info.partial


def test_an_empty_edit_before_the_first_frame(listed: tuple[Path, int], tmp_path: Path) -> None:
    frames, info = shown(listed, tmp_path, (700, -1), (2000, 0))
    assert frames == list(range(50))
    assert not info.partial


def test_an_edit_without_length_shows_nothing(listed: tuple[Path, int], tmp_path: Path) -> None:
    frames, info = shown(listed, tmp_path, (0, 0), (2000, 0))
    assert frames == list(range(50))
    assert not info.partial
    with pytest.raises(VideoError, match="without any picture"):
        shown(listed, tmp_path, (0, 0))


def test_a_moved_copy_of_an_avi_with_h264(tmp_path: Path) -> None:
    """B-frames without any presentation time, in the container and the copy alike."""
    source = write_video(tmp_path / "video.avi", bf="2", g="10", crf="10")
    assert indices(read(source)[0]) == list(range(50))
    assert indices(read(source, start=0.8, end=1.2)[0]) == list(range(20, 30))
    moved = copy(write_video(tmp_path / "video.mp4", bf="2", g="10", crf="10"), tmp_path / "moved.mkv", later(5))
    assert indices(read(moved)[0]) == list(range(50))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_spans_of_a_long_video_are_found_by_time(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"long.{suffix}", frames=1500, g="250", bf="3", crf="30", preset="ultrafast")
    for start in (9.2, 30.0, 55.56):
        first = round(start * 25)
        found = indices(read(path, start=start, end=start + 0.4)[0])
        assert all(abs(a - (first + k) % 62) % 61 <= 1 for k, a in enumerate(found))


def restamp(source: Path, target: Path, stamp: Callable[[int], int]) -> Path:
    """A copy of an FLV whose i-th tag has the stamp in ms that is given for its own."""
    data = bytearray(source.read_bytes())
    at = 13
    while at + 11 <= len(data):
        size, low, high = (int.from_bytes(data[at + a : at + b], "big") for a, b in ((1, 4), (4, 7), (7, 8)))
        time = stamp(high << 24 | low) & 0xFFFFFFFF
        data[at + 4 : at + 8] = (time & 0xFFFFFF).to_bytes(3, "big") + (time >> 24).to_bytes(1, "big")
        at += 11 + size + 4
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (lambda time: time - 2000, list(range(50))),  # before zero
        (lambda time: time + 0xFFFFFF - 500, list(range(50))),  # across 24 bits
        (lambda time: time if time < 1000 else time - 500, list(range(50))),  # a step back: by order
        (lambda time: 0, list(range(50))),  # no clock at all: by order
        (lambda time: time // 80 * 80, sorted([*range(1, 50, 2)] * 2)[:49]),  # of two with one time the later is shown
    ],
)
def test_odd_clocks(tmp_path: Path, stamp: Callable[[int], int], expected: list[int]) -> None:
    source = write_video(tmp_path / "source.flv", codec="flv", b="2M")
    frames, info = read(restamp(source, tmp_path / "odd.flv", stamp))
    assert indices(frames)[:49] == expected[:49]
    assert (info.damaged_frames, info.partial) == (0, False)
