"""What a task of an extraction takes of memory: the most that a worker held while it made shards of some size.

    python benchmarks/memory.py                  videos of 1,000 frames of noise, 2 and 8 to a shard, one worker
    python benchmarks/memory.py --frames 8000    how it grows with the length of a video

Noise is what no codec compresses: a second of it takes as much as many seconds of film. Prints for each size the
bytes of a shard, and the peak of the worker's resident memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import tyro

from jobs.extraction_log import format_table
from pipelines.formatting import format_bytes

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of a worker that extracts."""

    frames: int = 1000
    """Frames of each video."""
    side: int = 128
    """Height and width of the frames, in pixels."""
    videos_per_shard: tuple[int, ...] = (2, 8)
    """Sizes of shards to measure."""


def main() -> None:
    config = tyro.cli(Memory)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        noise = Path(folder) / "noise.avi"
        write_noise(noise, config)
        for count in config.videos_per_shard:
            videos = Path(folder) / f"videos-{count}"
            videos.mkdir()
            for index in range(count):
                os.link(noise, videos / f"{index}.avi")
            peak, size = measure(videos, Path(folder) / f"shards-{count}", count, config)
            rows.append((str(count), format_bytes(size), format_bytes(size / count), format_bytes(peak)))
    print(format_table(("videos a shard", "shard", "video", "worker's peak"), rows))


def write_noise(path: Path, config: Memory) -> None:
    """A video that no two frames of are alike."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=Fraction(25))
        stream.width = stream.height = config.side
        stream.pix_fmt = "yuv420p"
        for _ in range(config.frames):
            picture = rng.integers(0, 256, (config.side, config.side, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def measure(videos: Path, output: Path, count: int, config: Memory) -> tuple[int, int]:
    """Peak resident memory of the worker of one extraction, and the size of its shard, in bytes."""
    flags = ("--videos", videos, "--output", output, "--videos-per-shard", count, "--short-side", config.side)
    command = [sys.executable, ROOT / "jobs" / "extract_flow.py", *flags, "--num-cpus", 1, "--flow-backend", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while job.poll() is None:
        peak = max([peak, *(peak_of(pid) for pid in descendants(job.pid))])
        time.sleep(POLL_S)
    if job.returncode:
        raise RuntimeError(f"the extraction ended with exit status {job.returncode}")
    (shard,) = (output / "shards").iterdir()
    return peak, shard.stat().st_size


def descendants(pid: int) -> list[int]:
    """The processes below a process."""
    found, looked_at = [pid], 0
    while looked_at < len(found):
        for file in Path(f"/proc/{found[looked_at]}/task").glob("*/children"):
            try:
                found += [int(child) for child in file.read_text().split()]
            except OSError:  # it has ended meanwhile
                continue
        looked_at += 1
    return found[1:]


def peak_of(pid: int) -> int:
    """The most resident memory that a worker of Ray's had so far; 0 for another process."""
    try:
        if not Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::"):
            return 0
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
