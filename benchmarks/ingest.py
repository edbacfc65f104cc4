"""Does a training wait for its clips, and how fast do they come, against what people use today?

    python benchmarks/ingest.py                 self-made videos
    python benchmarks/ingest.py --videos DIR    your own, a folder per class

Three measurements on this machine, in one run: the share of step time that the small flow I3D waits for its clips on
all cores; clips a second of our stream of shards with no model behind it; and the same clips (RGB window, random start
and crop, flip) by a PyTorch DataLoader that decodes the videos' files, and by the webdataset library on our own tars.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
import tyro

import models
from jobs.cluster import connect
from models.input_spec import InputSpec
from pipelines.clips.augmentation import Augmentation, cut_training_clip
from pipelines.clips.sampling import ClipSettings
from pipelines.datasets.motion_videos import write_motion_videos
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.media.codec import decode_rgb

BATCH = 8
CORES = os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the ingest of a training."""

    videos: str | None = None
    """Folder of videos, one per class. None: self-made ones."""
    short_side: int = 256
    """Shorter side in pixels of the frames in the shards."""
    size: int = 224
    """Crop of the loaders' comparison."""
    frames: int = 64
    """Frames of its clips."""
    clips: int = 400
    """Clips of each measurement of it."""
    rounds: int = 3
    """Rounds, interleaved; the best of each loader counts."""
    steps: int = 120
    """Steps of the training that is watched, at the small recipe (96 px shards, 32 × 64 × 64)."""


def main() -> None:
    """Extract twice, train, load, print."""
    settings = tyro.cli(Settings, description=__doc__)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = settings.videos or str(folder / "videos")
        if settings.videos is None:
            write_motion_videos(videos, videos_per_class=12, seed=0, num_frames=100, size=(340, 256))
        extract(videos, f"{folder}/parquet", settings.short_side, "parquet")
        extract(videos, f"{folder}/tar", settings.short_side, "webdataset")
        extract(videos, f"{folder}/small", 96, "parquet")
        share = watch_training(f"{folder}/small", str(folder / "run"), settings.steps)
        print(f"waiting     {share:.2%} of the step time of the small flow I3D, after the first 20 steps", flush=True)
        compare(settings, folder, videos)


def extract(videos: str, output: str, short_side: int, kind: str) -> None:
    """Shards of the videos, as a user makes them."""
    flags = ["--videos", videos, "--output", output, "--short-side", str(short_side), "--format", kind]
    subprocess.run([sys.executable, "jobs/extract_flow.py", *flags], check=True, stdout=subprocess.DEVNULL)


def watch_training(data: str, run: str, steps: int) -> float:
    """Share of the step time that the workers waited for clips, without the start of the stream."""
    flags = f"--stream flow --preset small --steps {steps} --validation-split none --log-every 20".split()
    command = [sys.executable, "jobs/train.py", "--data", data, "--output", run, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    shares = [line["wait_share"] for line in lines if line["kind"] == "train"][1:]
    return sum(shares) / len(shares)


def compare(settings: Settings, folder: Path, videos: str) -> None:
    """Clips a second of each loader, and its ratio to our stream."""
    connect(log_to_driver=False)
    config = models.configure("i3d", num_classes=6, stream="rgb", size=settings.size, frames=settings.frames)
    input_spec = models.input_spec_of(config)
    index = read_index(f"{folder}/parquet").usable()
    tars = [str(path) for path in sorted((folder / "tar" / "shards").glob("*.tar"))]
    files = [str(Path(videos) / source) for source in index.table["source"].to_pylist()]
    loaders = {
        "our stream of Parquet shards": lambda: stream(index, input_spec, settings.clips),
        "our stream of tar shards": lambda: stream(read_index(f"{folder}/tar").usable(), input_spec, settings.clips),
        "DataLoader on the files": lambda: load_files(files, input_spec, settings.clips),
        "webdataset on our tars": lambda: load_tars(tars, input_spec, settings.clips),
    }
    best = dict.fromkeys(loaders, 0.0)
    for _ in range(settings.rounds):
        for name, load in loaders.items():
            best[name] = max(best[name], measure(load(), settings.clips))
    ours = best["our stream of Parquet shards"]
    for name, rate in best.items():
        print(f"{name:32}{rate:8.1f} clips/s   ours is {ours / rate:.2f} ×", flush=True)


def measure(batches: Iterable[Any], clips: int) -> float:
    """Clips a second after the first batch: starting workers is not loading."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    count = sum(1 for _ in iterator) * BATCH
    assert count >= clips - 2 * BATCH, count
    return count / (time.perf_counter() - started)


def stream(index: VideoIndex, input_spec: InputSpec, clips: int) -> Iterator[Any]:
    """Our stream, on all CPUs."""
    import ray

    from pipelines.clips.loader import Share, TrainingClips, stream_batches

    numbered = TrainingClips(
        videos=index, input_spec=input_spec, settings=ClipSettings(), augmentation=Augmentation(), seed=0
    )
    share = Share(start=0, rank=0, num_workers=1, batch=BATCH, steps=clips // BATCH)
    return stream_batches(numbered, share, num_cpus=ray.cluster_resources()["CPU"])


def cut(frames: np.ndarray, input_spec: InputSpec, rng: np.random.Generator) -> torch.Tensor:
    """A training clip of decoded frames, by the same code for every loader."""

    def read(_: str, start: int, stop: int | None) -> np.ndarray:
        return frames[start:stop]

    clip = cut_training_clip(read, len(frames), input_spec, ClipSettings(), Augmentation(), rng)["rgb"]
    return torch.from_numpy(clip)


class Files(torch.utils.data.Dataset):
    """Clips of the videos' own files: seek to the window, decode it, resize, crop."""

    def __init__(self, files: list[str], input_spec: InputSpec, clips: int) -> None:
        self.files, self.input_spec, self.clips = files, input_spec, clips

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, number: int) -> torch.Tensor:
        cv2.setNumThreads(1)
        rng = np.random.default_rng(number)
        with av.open(self.files[number % len(self.files)]) as container:
            video = container.streams.video[0]
            video.codec_context.thread_count = 1
            span = self.input_spec.train.span
            first = int(rng.integers(max(0, video.frames - span) + 1))
            container.seek(int(first / video.average_rate / video.time_base), stream=video)
            frames = []
            for frame in container.decode(video):
                if frame.time * video.average_rate >= first - 0.5:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == span:
                    break
        return cut(np.stack(frames), self.input_spec, rng)


def load_files(files: list[str], input_spec: InputSpec, clips: int) -> Iterable[Any]:
    """A DataLoader with one worker per core."""
    dataset = Files(files, input_spec, clips)
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=CORES, drop_last=True)


def load_tars(tars: list[str], input_spec: InputSpec, clips: int) -> Iterable[Any]:
    """The webdataset library: shuffled tars, a shuffle buffer, decoding of the window in its workers."""
    import webdataset

    def decode(sample: dict[str, Any]) -> torch.Tensor:
        cv2.setNumThreads(1)
        rng = np.random.default_rng()
        num_frames, span = json.loads(sample["json"])["num_frames"], input_spec.train.span
        first = int(rng.integers(max(0, num_frames - span) + 1))
        return cut(decode_rgb(sample["rgb.mp4"], start=first, stop=first + span), input_spec, rng)

    pipeline = webdataset.WebDataset(tars, shardshuffle=False, resampled=True).shuffle(100).map(decode)
    dataset = pipeline.with_epoch(clips // CORES // BATCH * BATCH)
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=CORES, drop_last=True)


if __name__ == "__main__":
    main()
