"""The process border around FFmpeg: a child decodes, so that a crash, a hang or a memory bomb costs one video.

The parent may be a Ray worker, so the child is a plain subprocess. It gets path, span and settings as one line of JSON
and answers with messages of a type, a length and JSON or raw pixels: nothing that a hijacked decoder sends is ever
unpickled. It sees neither credentials nor FFmpeg's network protocols, its memory, its processor time for a video and
the size of any file that it writes are limited by the kernel, and it ends with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import queue
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import av.logging
import numpy as np

from pipelines.errors import KINDS, VideoError
from pipelines.media.decode import DecodeSettings, VideoInfo, decode
from pipelines.media.resize import RGBFrame

HEADER = struct.Struct("=cI")  # message type, bytes that follow
SIZE = struct.Struct("=II")  # height and width, before a frame's pixels
FRAME, ALIVE, NOTE, RATE, INFO, ERROR = b"F", b"A", b"N", b"R", b"I", b"E"
MAX_JSON = 65_536  # bytes
ALIVE_EVERY_S = 1.0
MAX_SILENCE = 60  # timeouts that may pass without a frame, whatever signs of life there are
GRACE_S = 5.0  # for a child that is as good as dead to end
PIPE_BYTES = 1 << 20  # room for the next frames while the parent works on one
WRITABLE_BYTES = 1 << 20  # of any file, its error log among them; pipes have no limit

# What Python, the loader and the C library need; everything else, credentials above all, stays with the parent.
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
ROOT = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)


class Request(TypedDict):
    """What the parent asks for."""

    path: str
    start: float | None
    end: float | None
    settings: dict[str, Any]  # the fields of DecodeSettings


class Decoder:
    """Decodes local videos in a child process that serves video after video and is replaced when it dies.

    Also a context manager. A video begun before the one before was read to its end gets a second child.
    """

    def __init__(self, settings: DecodeSettings | None = None) -> None:
        self.settings = settings or DecodeSettings()
        self._idle: list[_Child] = []

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the child; a later video would start another."""
        while self._idle:
            self._idle.pop().stop()

    def frames(
        self,
        path: str | os.PathLike[str],
        *,
        start: float | None = None,
        end: float | None = None,
    ) -> DecodedFrames:
        """The (H,W,3) uint8 RGB frames of a local video as the settings say; see `pipelines.media.decode.decode`.

        Frames are decoded while they are read, a few ahead. Iterating raises VideoError, for this video only, at the
        start or after some frames. Breaking off costs a new child.
        """
        file = os.path.abspath(os.fspath(path))  # noqa: PTH100 - Path.resolve would follow links, absolute keeps ".."
        request: Request = {
            "path": file,
            "start": start,
            "end": end,
            "settings": asdict(self.settings),
        }
        return DecodedFrames(self, request)

    def _take(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            if child.process.poll() is None:
                return child
            child.stop()
        return _Child()

    def _give_back(self, child: _Child) -> None:
        if child.busy or self._idle:
            child.stop()
        else:
            self._idle.append(child)


class DecodedFrames:
    """Iterator over one video's frames; `info` is there once all were read."""

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self._decoder, self._request = decoder, request
        self._frames = self._read()
        self._info: VideoInfo | None = None
        self.pid: int | None = None  # of the decoding process, from the first frame on
        self.expected_fps: float | None = None  # frames a second, from the first frame on; `info.fps` is what came

    def __iter__(self) -> Iterator[RGBFrame]:
        return self

    def __next__(self) -> RGBFrame:
        return next(self._frames)

    @property
    def info(self) -> VideoInfo:
        """What the source was and how it decoded. Raises RuntimeError before the last frame was read."""
        if self._info is None:
            raise RuntimeError("the VideoInfo is complete only after the last frame: read all frames first")
        return self._info

    def close(self) -> None:
        """Give up the rest of the video."""
        self._frames.close()

    def _expect(self, fps: float) -> None:
        self.expected_fps = fps

    def _read(self) -> Generator[RGBFrame, None, None]:
        while self._info is None:
            child = self._decoder._take()
            self.pid = child.process.pid
            try:
                self._info = yield from child.decode(self._request, self._decoder.settings, self._expect)
            except VideoError as error:
                # It may have been dying when it was taken: what killed it, this video or one before, a new child tells.
                if error.kind != "decoder_crashed" or child.answered or not child.served:
                    raise
            finally:
                self._decoder._give_back(child)


@functools.cache
def process_decoder(settings: DecodeSettings) -> Decoder:
    """This process's own decoder for these settings; its child starts with the first video and stops at exit."""
    decoder = Decoder(settings)
    atexit.register(decoder.close)
    return decoder


class _Child:
    """The parent's end of one decoder process."""

    def __init__(self) -> None:
        self.busy = False  # with a video, or not fit for another
        self.served = False  # a video to its end
        self.answered = False  # the video at hand, with anything
        self.stderr: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.media.decoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            bufsize=0,
            cwd=ROOT,
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        with contextlib.suppress(OSError, AttributeError):  # Linux only, and within the user's quota
            fcntl.fcntl(self.answers, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN)

    def stop(self) -> None:
        """Kill and reap the process, whatever it is doing."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system still waits for a disk: it dies afterwards
            self.process.wait(GRACE_S)
        for pipe in (self.requests, self.answers, self.stderr):
            pipe.close()

    def decode(
        self, request: Request, settings: DecodeSettings, on_rate: Callable[[float], None]
    ) -> Generator[RGBFrame, None, VideoInfo]:
        """Yield the frames of one request and return its VideoInfo. Raises VideoError."""
        self.busy, self.answered = True, False
        with contextlib.suppress(BrokenPipeError):  # a dead child shows below, with the reason
            self.requests.write(json.dumps(request).encode() + b"\n")
        count, deadline = 0, patience(settings)
        while time.monotonic() < deadline:
            kind, size = HEADER.unpack(self.receive(HEADER.size, settings))
            self.answered = True
            if kind == FRAME and count < settings.max_frames:
                yield self.receive_frame(size, settings)
                count, deadline = count + 1, patience(settings)
            elif kind in (INFO, ERROR) and size <= MAX_JSON:
                return self.conclude(kind, self.receive_json(size, settings))
            elif kind == RATE and size <= MAX_JSON:
                on_rate(read_rate(self.receive_json(size, settings)))
            elif kind == NOTE and size <= MAX_JSON:
                warn_of_missing_limits(str(self.receive_json(size, settings).get("unlimited")))
            elif kind != ALIVE or size:
                raise nonsense()
        raise VideoError("decoder_hung", f"no frame came for {MAX_SILENCE} times {settings.timeout_s:g} s")

    def receive_json(self, size: int, settings: DecodeSettings) -> dict[str, Any]:
        """A message's content. Raises VideoError where it is none."""
        try:
            answer = json.loads(self.receive(size, settings))
        except (ValueError, RecursionError) as error:
            raise nonsense() from error
        if not isinstance(answer, dict):
            raise nonsense()
        return answer

    def conclude(self, kind: bytes, answer: dict[str, Any]) -> VideoInfo:
        """The VideoInfo or the VideoError that ends a video; a child that ran out of memory is not used again."""
        self.served = True
        if kind == INFO and answer.keys() != VideoInfo.__dataclass_fields__.keys():
            raise nonsense()
        error = answer.get("kind", "unreadable")
        self.busy = kind == ERROR and error == "out_of_memory"
        if kind == INFO:
            return VideoInfo(**answer)
        raise VideoError(error if error in KINDS else "unreadable", str(answer.get("message")))

    def receive_frame(self, size: int, settings: DecodeSettings) -> RGBFrame:
        """One (H,W,3) uint8 frame. Raises VideoError where its announced size is none, or none of these settings."""
        height, width = SIZE.unpack(self.receive(SIZE.size, settings))
        limit = settings.longest_side
        if not (0 < height <= limit and 0 < width <= limit and size == SIZE.size + 3 * height * width):
            raise nonsense()
        frame = np.empty((height, width, 3), np.uint8)
        self.receive_into(frame.data.cast("B"), settings)
        return frame

    def receive(self, size: int, settings: DecodeSettings) -> bytearray:
        buffer = bytearray(size)
        self.receive_into(memoryview(buffer), settings)
        return buffer

    def receive_into(self, buffer: memoryview, settings: DecodeSettings) -> None:
        """Fill the buffer from the pipe. Raises VideoError where the child is dead or silent for too long."""
        deadline = time.monotonic() + settings.timeout_s
        while buffer:
            wait_ms = math.ceil(1000 * (deadline - time.monotonic()))
            if wait_ms <= 0 or not self.poll.poll(wait_ms):
                raise VideoError("decoder_hung", f"the decoder gave no sign of life for {settings.timeout_s:g} s")
            count = os.readv(self.answers.fileno(), [buffer])
            if count == 0:
                raise self.explain_death(settings)
            buffer = buffer[count:]

    def explain_death(self, settings: DecodeSettings) -> VideoError:
        """How the child ended, with the last line it wrote."""
        try:
            code = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return VideoError("decoder_crashed", "the decoder process stopped answering and did not end")
        if code == -signal.SIGXCPU:
            limit = f"--decode-cpu-limit {settings.cpu_limit_s}"
            return VideoError("too_slow", f"decoding needs more processor time than {limit}")
        return VideoError("decoder_crashed", self.describe_death(code))

    def describe_death(self, code: int) -> str:
        """A sentence on an exit status."""
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - 500))
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        if code >= 0:
            return f"the decoder process ended with exit status {code}{last}"
        hint = " (often sent by the system when memory runs out)" if code == -signal.SIGKILL else ""
        return f"the decoder process was ended by {signal.Signals(-code).name}{hint}{last}"


def patience(settings: DecodeSettings) -> float:
    """When the next frame must have come, on the monotonic clock."""
    return time.monotonic() + MAX_SILENCE * settings.timeout_s


def read_rate(answer: dict[str, Any]) -> float:
    """The frames a second that a child announces. Raises VideoError where it announces something else."""
    fps = answer.get("fps")
    if not isinstance(fps, float) or not 0 < fps < math.inf:
        raise nonsense()
    return fps


def nonsense() -> VideoError:
    return VideoError("decoder_crashed", "the decoder process sent nonsense")


@functools.cache
def warn_of_missing_limits(what: str) -> None:
    """Say, once in a process, what this system does not limit."""
    logger.warning("this system does not limit the %s of decoders: a hostile file may use it up", what)


def serve() -> None:
    """The child: answer requests until the parent closes the pipe or is gone."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=PIPE_BYTES)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    set_limit("RLIMIT_CORE", 0, hard=True)
    set_limit("RLIMIT_FSIZE", WRITABLE_BYTES, hard=True)
    silence_ffmpeg()
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=watch, args=(requests, lines), daemon=True).start()
    while True:
        answer(json.loads(lines.get()), answers)


def silence_ffmpeg() -> None:
    """Keep FFmpeg's error lines for PyAV's exceptions, and print none."""
    av.logging.set_level(av.logging.ERROR)
    ffmpeg = logging.getLogger("libav")
    ffmpeg.addHandler(logging.NullHandler())
    ffmpeg.propagate = False


def watch(requests: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    """Pass requests on; end the process, even in the midst of a video, when the parent is gone."""
    for line in requests:
        lines.put(line)
    os._exit(0)


def answer(request: Request, answers: BinaryIO) -> None:
    """Decode one video and write its frames and its VideoInfo, or the error."""
    settings = DecodeSettings(**request["settings"])
    unlimited = set_limits(settings)
    if unlimited:
        send(answers, NOTE, json.dumps({"unlimited": " and ".join(unlimited)}).encode())
    try:
        frames = decode(
            request["path"],
            settings=settings,
            start=request["start"],
            end=request["end"],
            on_progress=Pulse(answers).beat,
            on_rate=lambda fps: send(answers, RATE, json.dumps({"fps": fps}).encode()),
        )
        info = send_frames(answers, frames)
        send(answers, INFO, json.dumps(asdict(info)).encode())
    except BrokenPipeError:
        raise SystemExit(0) from None  # the parent is gone
    except VideoError as error:
        if error.kind == "corrupt" and reached_limit(settings.memory_limit_mb):  # H.264 reports a failed malloc so
            error = VideoError("out_of_memory", f"decoding needs more than --decode-memory {settings.memory_limit_mb}")
        send_error(answers, error.kind, error.message)
    except Exception as error:  # the border: whatever else a hostile file makes PyAV raise costs this video only
        send_error(answers, "unreadable", f"{type(error).__name__}: {error}")


def set_limits(settings: DecodeSettings) -> list[str]:
    """Limit memory, and end the process by SIGXCPU once it has computed for too long from now on.

    Returns what the system does not limit: macOS refuses a limit of the address space.
    """
    memory, seconds = settings.memory_limit_mb, settings.cpu_limit_s
    limited = {
        "memory": set_limit("RLIMIT_AS", None if memory is None else memory << 20),
        "processor time": set_limit(
            "RLIMIT_CPU", None if seconds is None else math.ceil(time.process_time() + seconds)
        ),
    }
    return [name for name, done in limited.items() if not done]


def set_limit(name: str, value: int | None, *, hard: bool = False) -> bool:
    """Lower one of the kernel's limits as far as the one in force allows; None: take it off. False: it is refused."""
    limit = getattr(resource, name)
    try:
        _, most = resource.getrlimit(limit)
        soft = most if value is None else value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (soft, soft if hard else most))
    except (OSError, ValueError):
        return value is None
    return True


def reached_limit(limit_mb: int | None) -> bool:
    """Whether the process's address space was nearly as large as allowed at some time."""
    status = Path("/proc/self/status")
    if limit_mb is None or not status.exists():
        return False
    peak_kb = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmPeak:"))
    return peak_kb > 0.9 * 1024 * limit_mb


class Pulse:
    """Signs of life while packets are read that yield no frame yet."""

    def __init__(self, answers: BinaryIO) -> None:
        self.answers, self.last = answers, time.monotonic()

    def beat(self) -> None:
        if time.monotonic() - self.last > ALIVE_EVERY_S:
            send(self.answers, ALIVE, b"")
            self.last = time.monotonic()


def send_frames(answers: BinaryIO, frames: Generator[RGBFrame, None, VideoInfo]) -> VideoInfo:
    while True:
        try:
            frame = next(frames)
        except StopIteration as stop:
            return stop.value
        height, width, _ = frame.shape
        answers.write(HEADER.pack(FRAME, SIZE.size + frame.nbytes) + SIZE.pack(height, width))
        answers.write(frame.data.cast("B"))
        answers.flush()


def send_error(answers: BinaryIO, kind: str, message: str) -> None:
    send(answers, ERROR, json.dumps({"kind": kind, "message": message[:1000]}).encode())


def send(answers: BinaryIO, kind: bytes, payload: bytes) -> None:
    answers.write(HEADER.pack(kind, len(payload)) + payload)
    answers.flush()


if __name__ == "__main__":
    serve()
