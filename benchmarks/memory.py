"""What a task takes of memory: the most that a worker held while it made shards of some size, or features.

    python benchmarks/memory.py                  videos of 1,000 frames of noise, 2 and 8 to a shard, one worker
    python benchmarks/memory.py --frames 8000    how it grows with the length of a video
    python benchmarks/memory.py features         features of a video of two minutes, and of one of two hours
    python benchmarks/memory.py features --size 224 --frames 200    by networks that see 224 px

Noise is what no codec compresses: a second of it takes as much as many seconds of film. Prints for each size the
bytes of a shard, or of a video's features, and the peak of the worker's resident memory.
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


@dataclass(frozen=True, kw_only=True)
class FeatureMemory:
    """Peak memory of a worker that makes features of both streams."""

    frames: tuple[int, ...] = (3_000, 180_000)
    """Frames of the video, for each measurement: at 25 a second two minutes and two hours."""
    width: float = 1.0
    """Width of the networks; 1 is the paper's, whose vectors have 1024 numbers."""
    size: int = 32
    """Pixels of their crop; 224 is the paper's."""
    window: int = 16
    """Frames of a window."""
    stride: int = 8
    """Frames between windows."""
    layout: str = "npy"
    """Layout of the features."""


def main() -> None:
    if sys.argv[1:2] == ["features"]:
        measure_features(tyro.cli(FeatureMemory, args=sys.argv[2:]))
    else:
        measure_shards(tyro.cli(Memory))


def measure_shards(config: Memory) -> None:
    """Print a row for each size of shards."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        noise = Path(folder) / "noise.avi"
        write_noise(noise, config)
        for count in config.videos_per_shard:
            videos = Path(folder) / f"videos-{count}"
            videos.mkdir()
            for index in range(count):
                os.link(noise, videos / f"{index}.avi")
            output = Path(folder) / f"shards-{count}"
            flags = ("--videos-per-shard", count, "--short-side", config.side, "--flow-backend", "cpu")
            peak = measure("extract_flow", "--videos", videos, "--output", output, *flags)
            (shard,) = (output / "shards").iterdir()
            size = shard.stat().st_size
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


def measure_features(config: FeatureMemory) -> None:
    """Print a row for each length of video."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        networks = save_networks(Path(folder), config)
        for count in config.frames:
            video, output = Path(folder) / f"{count}.mp4", Path(folder) / f"features-{count}"
            write_pan(video, count, config.size + 8)
            flags = ("--window", config.window, "--stride", config.stride, "--layout", config.layout)
            peak = measure("extract_features", "--videos", video, "--output", output, *networks, *flags)
            size = sum(path.stat().st_size for path in (output / "features").rglob("*") if path.is_file())
            rows.append((f"{count:,}", format_bytes(size), format_bytes(peak)))
    print(format_table(("frames", "features", "worker's peak"), rows))


def save_networks(folder: Path, config: FeatureMemory) -> list[str]:
    """Flags that name an I3D of random weights for each stream."""
    import models
    from models import checkpoint
    from models.checkpoint import Metadata
    from pipelines.clips.sampling import ClipSettings

    for stream in ("rgb", "flow"):
        settings = {"width": config.width, "size": config.size, "frames": config.window}
        model = models.build("i3d", num_classes=2, stream=stream, **settings)
        clips = ClipSettings(short_side=config.size + 8).to_json()
        checkpoint.save(folder / stream, model, Metadata(classes=("a", "b"), clips=clips))
    return ["--rgb", str(folder / "rgb"), "--flow", str(folder / "flow")]


def write_pan(path: Path, num_frames: int, side: int) -> None:
    """A video of a texture that moves, which H.264 compresses to little."""
    texture = np.random.default_rng(0).integers(0, 256, (side, 4 * side, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"preset": "ultrafast"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            at = index % (3 * side)
            picture = np.ascontiguousarray(texture[:, at : at + side])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def measure(name: str, *flags: object) -> int:
    """Peak resident memory of the worker of one job, in bytes."""
    command = [sys.executable, ROOT / "jobs" / f"{name}.py", *flags, "--num-cpus", 1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while job.poll() is None:
        peak = max([peak, *(peak_of(pid) for pid in descendants(job.pid))])
        time.sleep(POLL_S)
    if job.returncode:
        raise RuntimeError(f"{name} ended with exit status {job.returncode}")
    return peak


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
