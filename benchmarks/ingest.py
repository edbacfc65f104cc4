"""Does a training wait for its clips, and how fast do they come, against what people use today?

    python benchmarks/ingest.py                 self-made videos
    python benchmarks/ingest.py --videos DIR    your own, a folder per class

Measured on this machine, in one run: the CPU time of cutting a clip, RGB and flow, beside that of decoding the frames
that it needs with PyAV and doing nothing with them; clips a second of our stream of shards with no model behind it,
beside the same clips (RGB window, random start and crop, flip) by a PyTorch DataLoader that decodes the videos' files
and by the webdataset library on our own tars; and the share of step time that the small flow I3D waits for its clips on
all cores. `--json` prints the figures on one line at the end: seconds, clips a second, and ratios such as
`flow_over_bare_decode` (1 is the floor) and `over_webdataset`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np
import torch
import tyro

import models
from jobs.cluster import connect
from models.input_spec import STREAMS, InputSpec, Stream
from pipelines.clips.augmentation import Augmentation, cut_training_clip
from pipelines.clips.sampling import ClipSettings, flip_frames
from pipelines.datasets.motion_videos import write_motion_videos
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.media.codec import decode_rgb
from pipelines.media.mp4 import Area, read_frames

if TYPE_CHECKING:  # Ray reads its environment when it is imported, and `connect` sets it
    from pipelines.clips.numbered import TrainingClips

BATCH = 8
CORES = os.cpu_count() or 1
TOGETHER = 4  # clips of one window, where windows are shared


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
    """Steps of the training that is watched, at the small recipe (96 px shards, 32 × 64 × 64). 0: none."""
    json: bool = False
    """Print the figures as one line of JSON at the end."""


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
        figures: dict[str, float] = {}
        figures |= compare(settings, folder, videos)
        for stream in STREAMS:
            figures |= compare_with_bare_decode(settings, read_index(f"{folder}/parquet").usable(), stream)
        if settings.steps:
            extract(videos, f"{folder}/small", 96, "parquet")
            share = watch_training(f"{folder}/small", str(folder / "run"), settings.steps)
            print(
                f"waiting     {share:.2%} of the step time of the small flow I3D, after the first 20 steps", flush=True
            )
            figures["wait_share"] = share
    if settings.json:
        print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


def numbered_clips(settings: Settings, index: VideoIndex, name: Stream) -> TrainingClips:
    """The clips of a training of I3D on one stream."""
    from pipelines.clips.numbered import TrainingClips

    config = models.configure("i3d", num_classes=6, stream=name, size=settings.size, frames=settings.frames)
    return TrainingClips(
        videos=index,
        input_spec=models.input_spec_of(config),
        settings=ClipSettings(),
        augmentation=Augmentation(),
        seed=0,
    )


def compare_with_bare_decode(settings: Settings, index: VideoIndex, name: Stream) -> dict[str, float]:
    """CPU seconds of a clip and of decoding the frames it needs, in turns on one core; the fastest round counts."""
    clips = numbered_clips(settings, index, name)
    numbers = range(min(settings.clips, 24))
    together = replace(clips, augmentation=Augmentation(repeats=TOGETHER))
    cutting, decoding, sharing = [], [], []
    for turn in range(settings.rounds + 1):
        started = time.process_time()
        for number in numbers:
            assert clips.cut(number)["weight"] == 1
        cut_s = time.process_time() - started
        decode_s = sum(decode_bare(clips, name, number) for number in numbers)
        started = time.process_time()
        assert all(clip["weight"] == 1 for clip in together.cut_all(numbers))
        shared_s = time.process_time() - started
        if turn:  # the first one opens files and loads libraries
            cutting.append(cut_s / len(numbers))
            decoding.append(decode_s / len(numbers))
            sharing.append(shared_s / len(numbers))
    cut_s, decode_s, shared_s = min(cutting), min(decoding), min(sharing)
    times = f"{1e3 * cut_s:.1f} ms of a core, bare decode {1e3 * decode_s:.1f} ms"
    print(f"{name:4} clip   {times}: {cut_s / decode_s:.2f} ×", flush=True)
    shared = f"{1e3 * shared_s:.1f} ms each: {shared_s / decode_s:.2f} ×"
    print(f"            {TOGETHER} of one window (--repeats {TOGETHER}) {shared}", flush=True)
    return {
        f"{name}_clip_s": cut_s,
        f"{name}_bare_decode_s": decode_s,
        f"{name}_over_bare_decode": cut_s / decode_s,
        f"{name}_together_over_bare_decode": shared_s / decode_s,
    }


def decode_bare(clips: TrainingClips, name: Stream, number: int) -> float:
    """CPU seconds of decoding what clip `number` needs, from the keyframe before it on; its row is read already."""
    from pipelines.clips.numbered import read_stored

    video = clips.videos.row(clips.video_of(number))
    span = clips.input_spec.train.span
    length = video["num_frames"] - (name == "flow")
    # The start that the clip itself draws.
    start = int(np.random.default_rng([clips.seed, number]).integers(max(0, length - span) + 1))
    data = read_stored(video, [name])[name]
    started = time.process_time()
    for index, _ in read_frames(data, start=start):
        if index >= min(start + span, length) - 1:
            break
    return time.process_time() - started


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


def compare(settings: Settings, folder: Path, videos: str) -> dict[str, float]:
    """Clips a second of each loader, and its ratio to our stream."""
    connect(log_to_driver=False)
    index = read_index(f"{folder}/parquet").usable()
    ours, ours_of_tars = (
        numbered_clips(settings, each, "rgb") for each in (index, read_index(f"{folder}/tar").usable())
    )
    input_spec = ours.input_spec
    tars = [str(path) for path in sorted((folder / "tar" / "shards").glob("*.tar"))]
    files = [str(Path(videos) / source) for source in index.table["source"].to_pylist()]
    loaders = {
        "our stream of Parquet shards": lambda: stream(ours, settings.clips),
        "our stream of tar shards": lambda: stream(ours_of_tars, settings.clips),
        "DataLoader on the files": lambda: load_files(files, input_spec, settings.clips),
        "webdataset on our tars": lambda: load_tars(tars, input_spec, settings.clips),
    }
    best = dict.fromkeys(loaders, 0.0)
    for _ in range(settings.rounds):
        for name, load in loaders.items():
            best[name] = max(best[name], measure(load(), settings.clips))
    rate = best["our stream of Parquet shards"]
    for name, other in best.items():
        print(f"{name:32}{other:8.1f} clips/s   ours is {rate / other:.2f} ×", flush=True)
    return {
        "clips_per_s": rate,
        "over_dataloader": rate / best["DataLoader on the files"],
        "over_webdataset": rate / best["webdataset on our tars"],
    }


def measure(batches: Iterable[Any], clips: int) -> float:
    """Clips a second after the first batch: starting workers is not loading."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    count = sum(1 for _ in iterator) * BATCH
    assert count >= clips - 2 * BATCH, count
    return count / (time.perf_counter() - started)


def stream(clips: TrainingClips, count: int) -> Iterator[Any]:
    """Our stream, on all CPUs."""
    import ray

    from pipelines.clips.loader import stream_batches
    from pipelines.clips.numbered import WorkerPart

    part = WorkerPart(start=0, rank=0, num_workers=1, batch=BATCH, steps=count // BATCH)
    return stream_batches(clips, part, num_cpus=ray.cluster_resources()["CPU"])


def cut(decoded: np.ndarray, input_spec: InputSpec, rng: np.random.Generator) -> torch.Tensor:
    """A training clip of decoded frames, by the same code for every loader."""

    def read(stream: str, frames: Sequence[int], area: Area | None, *, mirrored: bool) -> np.ndarray:
        rows, columns = area.slices if area else (slice(None), slice(None))
        found = decoded[frames[0] : frames[-1] + 1, rows, columns]
        return flip_frames(found) if mirrored else found

    shape = len(decoded), *decoded.shape[1:3]
    return torch.from_numpy(cut_training_clip(read, shape, input_spec, ClipSettings(), Augmentation(), rng)["rgb"])


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
