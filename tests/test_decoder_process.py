"""The process border: whatever becomes of the decoding process, one video is lost and the next one decodes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_decode import write_video

from pipelines.errors import VideoError
from pipelines.media.decode import DecodeSettings, decode
from pipelines.media.decoder_process import ROOT, DecodedFrames, Decoder, process_decoder, warn_of_missing_limits

SMALL = DecodeSettings(short_side=32, timeout_s=20)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes of moving bars: far more than fits into the pipe."""
    return write_video(tmp_path_factory.mktemp("video") / "bars.mp4", frames=3000, size=(96, 64))


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder(SMALL) as decoder:
        yield decoder


def alive(pid: int) -> bool:
    """Whether a process runs; a killed one that nobody has reaped does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_death(pid: int) -> None:
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def begin(decoder: Decoder, video: Path) -> tuple[DecodedFrames, int]:
    frames = decoder.frames(video)
    next(frames)
    assert frames.pid is not None
    return frames, frames.pid


def test_yields_what_decode_yields(decoder: Decoder, video: Path) -> None:
    there = decoder.frames(video, start=1, end=3)
    here = decode(video, settings=SMALL, start=1, end=3)
    assert all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))
    assert there.info.frames == 50


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_costs_one_video(decoder: Decoder, video: Path, number: signal.Signals) -> None:
    frames, pid = begin(decoder, video)
    os.kill(pid, number)
    with pytest.raises(VideoError, match=number.name) as caught:
        list(frames)
    assert caught.value.kind == "decoder_crashed"
    assert len(list(decoder.frames(video, start=0, end=2))) == 50


def test_a_hang_costs_one_video(video: Path) -> None:
    with Decoder(DecodeSettings(short_side=32, timeout_s=2)) as decoder:
        frames, pid = begin(decoder, video)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(VideoError, match="no sign of life for 2 s") as caught:
            list(frames)
        assert caught.value.kind == "decoder_hung"
        assert not alive(pid)
        assert len(list(decoder.frames(video, start=0, end=2))) == 50


@pytest.mark.parametrize("noticed", [True, False])
def test_a_child_that_died_between_two_videos_costs_none(decoder: Decoder, video: Path, noticed: bool) -> None:
    first = decoder.frames(video, start=0, end=2)
    list(first)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSEGV)
    wait_for_death(first.pid)
    if not noticed:  # it is dying: the system does not hand out an exit status yet
        decoder._idle[0].process.poll = lambda: None  # type: ignore[method-assign]
    assert len(list(decoder.frames(video, start=0, end=2))) == 50


def test_one_child_serves_video_after_video_and_stops_at_close(video: Path) -> None:
    with Decoder(SMALL) as decoder:
        streams = [decoder.frames(video, start=0, end=1) for _ in range(3)]
        assert [len(list(stream)) for stream in streams] == [25, 25, 25]
        pids = {stream.pid for stream in streams}
        assert len(pids) == 1
    assert not alive(pids.pop() or 0)


def test_an_error_leaves_the_child_in_service(decoder: Decoder, video: Path, tmp_path: Path) -> None:
    (tmp_path / "note.mp4").write_text("not a video")
    bad, good = decoder.frames(tmp_path / "note.mp4"), decoder.frames(video, start=0, end=1)
    with pytest.raises(VideoError, match="cannot read"):
        list(bad)
    assert len(list(good)) == 25
    assert good.pid == bad.pid


def test_breaking_off_stops_the_child(decoder: Decoder, video: Path) -> None:
    frames, pid = begin(decoder, video)
    frames.close()
    assert not alive(pid)
    assert len(list(decoder.frames(video, start=0, end=1))) == 25


def test_two_videos_at_a_time(decoder: Decoder, video: Path) -> None:
    pairs = list(zip(decoder.frames(video, start=0, end=1), decoder.frames(video, start=0, end=1), strict=True))
    assert len(pairs) == 25
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_info_is_not_there_too_early(decoder: Decoder, video: Path) -> None:
    frames, _ = begin(decoder, video)
    with pytest.raises(RuntimeError, match="read all frames first"):
        _ = frames.info


def test_memory_limit(tmp_path: Path) -> None:
    large = write_video(tmp_path / "large.mp4", frames=3, size=(8192, 4320), preset="ultrafast", bf="3")
    with Decoder(DecodeSettings(short_side=32, memory_limit_mb=512)) as decoder:
        frames = decoder.frames(large)
        with pytest.raises(VideoError, match="--decode-memory 512") as caught:
            list(frames)
        assert caught.value.kind == "out_of_memory"
        assert frames.pid is not None
        assert not alive(frames.pid)
    with Decoder(DecodeSettings(short_side=32)) as generous:
        assert len(list(generous.frames(large))) == 3


def peak_mb(pid: int | None, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    options = {"preset": "ultrafast", "crf": "30", "refs": "4", "bf": "3"}
    path = write_video(tmp_path / "long.mp4", frames=150, size=(1920, 1080), **options)
    with Decoder() as decoder:
        frames = decoder.frames(path)
        assert sum(1 for _ in frames) == 150  # 0.9 GB of pictures
        assert peak_mb(frames.pid, "VmHWM") < 200


@pytest.mark.slow
def test_4k_av1_needs_half_the_memory_limit(tmp_path: Path) -> None:
    size, codec = (3840, 2160), "libsvtav1"
    path = write_video(tmp_path / "4k.mkv", frames=12, size=size, codec=codec, pixel_format="yuv420p10le", preset="12")
    with Decoder() as decoder:
        frames = decoder.frames(path)
        assert sum(1 for _ in frames) == 12
        assert peak_mb(frames.pid, "VmPeak") < (decoder.settings.memory_limit_mb or 0) / 2


def test_the_child_does_not_see_credentials(decoder: Decoder, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    _, pid = begin(decoder, video)
    assert b"s3cret" not in Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.parametrize("stage", ["idle", "mid_video"])
def test_the_child_ends_with_its_parent(video: Path, stage: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(video), stage], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for_death(pid)


PARENT = """
import sys, time
from pipelines.media.decoder_process import Decoder
idle = sys.argv[2] == "idle"
frames = Decoder().frames(sys.argv[1], start=0, end=2 if idle else 100)
next(frames)
if idle:
    list(frames)
print(frames.pid, flush=True)
time.sleep(60)
"""


def test_odd_file_names(decoder: Decoder, video: Path, tmp_path: Path) -> None:
    for name in ["a:b|c%03d 'x'.mp4", "-i.mp4", "http:.mp4", "视频.mp4", os.fsdecode(b"\xff\xfe.mp4"), "new\nline.mp4"]:
        (tmp_path / name).symlink_to(video)
        assert len(list(decoder.frames(tmp_path / name, start=0, end=1))) == 25


def test_truncated_before_the_index(decoder: Decoder, video: Path, tmp_path: Path) -> None:
    (tmp_path / "part.mp4").write_bytes(video.read_bytes()[:2000])
    with pytest.raises(VideoError, match="moov atom not found") as caught:
        list(decoder.frames(tmp_path / "part.mp4"))
    assert caught.value.kind == "unreadable"


def test_relative_path(decoder: Decoder, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(video.parent)
    assert len(list(decoder.frames(video.name, start=0, end=1))) == 25


def test_video_error_pickles() -> None:
    error = pickle.loads(pickle.dumps(VideoError("truncated", "the file is cut off")))
    assert (error.kind, str(error)) == ("truncated", "the file is cut off")


def test_one_decoder_a_process() -> None:
    assert process_decoder(SMALL) is process_decoder(DecodeSettings(short_side=32, timeout_s=20))
    assert process_decoder(SMALL) is not process_decoder(DecodeSettings())


# --- a child that does not do as it should, and systems that do not do as Linux does ---


def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let children run this code when they start."""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")


# What a hijacked child does instead of serving, with `out`, its pipe, and `head`, a message's head.
HIJACKED = """
import os, struct, sys, time
if "pipelines.media.decoder_process" in " ".join(sys.orig_argv):
    out = os.dup(1)
    head = lambda kind, size: struct.pack("=cI", kind, size)
    picture = struct.pack("=II", 32, 48) + bytes(3 * 32 * 48)
    try:
{}
    except OSError:
        pass
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("deed", "kind"),
    [
        ("os.close(0), os.close(1), os.close(out), time.sleep(60)", "decoder_crashed"),
        ("while True: os.write(out, head(b'A', 0)), time.sleep(0.01)", "decoder_hung"),
        ("while True: os.write(out, head(b'F', len(picture)) + picture)", "decoder_crashed"),
        ("while True: os.write(out, head(b'N', 2) + b'{{}}')", "decoder_hung"),
        ("os.write(out, head(b'I', 2) + b'[]'), time.sleep(60)", "decoder_crashed"),
        ("os.write(out, head(b'I', 2) + b'{{}}'), time.sleep(60)", "decoder_crashed"),
        ("os.write(out, head(b'E', 2) + b'no'), time.sleep(60)", "decoder_crashed"),
        ("os.write(out, head(b'F', 8) + bytes(8)), time.sleep(60)", "decoder_crashed"),
    ],
)
def test_a_hijacked_child_costs_one_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Path, deed: str, kind: str
) -> None:
    monkeypatch.setattr("pipelines.media.decoder_process.GRACE_S", 0.2)
    monkeypatch.setattr("pipelines.media.decoder_process.MAX_SILENCE", 0.2)
    patched(tmp_path, monkeypatch, HIJACKED.format(" " * 8 + deed.replace("{{}}", "{}")))
    begun = time.monotonic()
    with Decoder(DecodeSettings(short_side=32, timeout_s=5, max_frames=50)) as decoder:
        frames = decoder.frames(video)
        with pytest.raises(VideoError) as caught:
            list(frames)
        assert caught.value.kind == kind
        assert not alive(frames.pid or 0)
    assert time.monotonic() - begun < 5


NO_LIMITS = """
import resource
def refuse(*_):
    raise ValueError("current limit exceeds maximum limit")
resource.setrlimit = refuse
"""
NOT_LINUX = """
import fcntl, os, pathlib
for module, names in ((fcntl, ["F_SETPIPE_SZ"]), (os, [n for n in dir(os) if n.startswith(("sched_", "SCHED_"))])):
    for name in names:
        delattr(module, name)
def hide(method):
    def hidden(self, *args, **kwargs):
        if str(self).startswith(("/proc", "/dev/shm", "/sys")):
            raise FileNotFoundError(str(self))
        return method(self, *args, **kwargs)
    return hidden
for name in ("open", "read_text", "read_bytes", "iterdir", "readlink", "stat"):
    setattr(pathlib.Path, name, hide(getattr(pathlib.Path, name)))
"""


def test_videos_decode_where_no_limit_can_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_missing_limits.cache_clear()
    patched(tmp_path, monkeypatch, NO_LIMITS + NOT_LINUX)
    with Decoder(SMALL) as decoder:
        assert [len(list(decoder.frames(video, start=0, end=1))) for _ in range(2)] == [25, 25]
    assert [record.message for record in caplog.records] == [
        "this system does not limit the memory and processor time of decoders: a hostile file may use it up"
    ]


def test_videos_decode_under_a_hard_limit_below_ours(tmp_path: Path, video: Path) -> None:
    code = "import sys; from pipelines.media.decoder_process import Decoder; "
    code += "print(len(list(Decoder().frames(sys.argv[1], start=0, end=1))))"
    limits = "ulimit -v 2500000; ulimit -f 1000; ulimit -t 600"
    command = f'{limits}; exec "{sys.executable}" -c "{code}" "{video}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == ("25\n", "")
