"""What a frame costs beyond its steps: one core's time of each step by itself, of a task that takes them all, and Ray.

    python benchmarks/extraction.py                       60 UT-Interaction clips, two processes, three rounds
    python benchmarks/extraction.py --json                the figures on one line at the end, too

The parts are decoding, RGB encoding, flow and its encoding, of videos in memory; the whole is the task that makes a
shard of the same videos, its decoder process included, on the same core. Then the graph on Ray against a bare pool of
processes that runs the same tasks: both are warm before the clock runs (Ray started, workers and kernels loaded), both
extract the same videos into the same shards, and the rounds alternate.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import tyro

from jobs.cluster import connect
from jobs.extraction_log import format_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from pipelines.extraction.graph import Steps
    from pipelines.media.codec import FlowEncoder, RGBEncoder

UT_INTERACTION = Path(__file__).resolve().parents[2] / "shared" / "data" / "ut_interaction"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Extraction through Ray against a bare pool of processes."""

    videos: str = str(UT_INTERACTION)
    """Folder of videos."""
    annotations: str | None = None
    """Annotations, as for jobs/extract_flow.py."""
    limit: int = 60
    """Videos."""
    processes: int = 2
    """Processes of the pool, and CPUs that Ray may use."""
    videos_per_shard: int = 5
    """Videos in a shard."""
    rounds: int = 3
    """Times that each side runs."""
    json: bool = False
    """Print the figures as one line of JSON at the end."""


def main() -> None:
    config = tyro.cli(Benchmark)
    connect(num_cpus=config.processes)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        blocks, steps = prepare(config, folder)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures |= pool.apply(measure_frame, (blocks[:2], steps, config.rounds))
        print_frame(figures)
        with multiprocessing.get_context("spawn").Pool(config.processes) as pool:
            run_pool(pool, blocks[:2], steps)
            run_ray(blocks[:2], steps, config.processes)
            rounds = [
                (run_pool(pool, blocks, steps), run_ray(blocks, steps, config.processes)) for _ in range(config.rounds)
            ]
    print(
        format_table(
            ("round", "pool s", "ray s", "ratio"),
            [(str(i), f"{p:.1f}", f"{r:.1f}", f"{r / p:.3f}") for i, (p, r) in enumerate(rounds, 1)],
        )
    )
    ratio = statistics.median(r / p for p, r in rounds)
    print(f"median ratio {ratio:.3f} on {os.cpu_count()} CPUs, {config.limit} videos, {config.processes} processes")
    if config.json:
        figures["ray_over_pool"] = ratio
        print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


def measure_frame(blocks: list[pa.Table], steps: Steps, rounds: int) -> dict[str, float]:
    """Milliseconds of a core for each step of a frame by itself, for all in a task, and how much more that is.

    The fastest round of each counts; the first one loads libraries and starts the decoder process.
    """
    # On one core all that runs at the same time takes turns: wall time is the time of the core.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    paths = [path for block in blocks for path in block["path"].to_pylist() if path]
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        found, frames = measure_steps(paths, steps)
        started = time.perf_counter()
        for block in blocks:
            steps.make_shard(block)
        found["whole"] = time.perf_counter() - started
        if turn:
            for name, seconds in found.items():
                times.setdefault(f"{name}_ms", []).append(1e3 * seconds / frames)
    best = {name: min(values) for name, values in times.items()}
    parts = sum(value for name, value in best.items() if name != "whole_ms")
    return best | {"parts_ms": parts, "whole_over_parts": best["whole_ms"] / parts}


def measure_steps(paths: list[str], steps: Steps) -> tuple[dict[str, float], int]:
    """Seconds of each step by itself over all videos, and their frames."""
    import cv2
    import numpy as np

    from pipelines import tvl1
    from pipelines.media.codec import FlowEncoder, RGBEncoder
    from pipelines.media.decode import decode

    cv2.setNumThreads(1)
    seconds = dict.fromkeys(("decode", "rgb", "flow", "flow_encoding"), 0.0)
    count, settings = 0, steps.settings
    for path in paths:
        marks = [time.perf_counter()]
        frames = list(decode(path, settings=settings.decode))
        height, width = frames[0].shape[:2]
        marks.append(time.perf_counter())
        encode(RGBEncoder(settings.codec, height=height, width=width), frames)
        marks.append(time.perf_counter())
        grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
        flow = tvl1.flow(grey, preset=settings.flow_preset, backend=steps.backend)
        marks.append(time.perf_counter())
        encode(FlowEncoder(settings.codec, height=height, width=width), flow)
        marks.append(time.perf_counter())
        for name, begun, ended in zip(seconds, marks, marks[1:], strict=False):
            seconds[name] += ended - begun
        count += len(frames)
    return seconds, count


def encode(encoder: RGBEncoder | FlowEncoder, images: Iterable[np.ndarray]) -> None:
    for image in images:
        encoder.write(image)
    encoder.close()


def print_frame(figures: dict[str, float]) -> None:
    names = ("decode_ms", "rgb_ms", "flow_ms", "flow_encoding_ms", "parts_ms", "whole_ms")
    print(format_table([name.removesuffix("_ms") for name in names], [[f"{figures[name]:.2f}" for name in names]]))
    print(
        f"a task takes {figures['whole_over_parts']:.3f} × the parts' milliseconds of a core for a frame\n", flush=True
    )


def prepare(config: Benchmark, folder: str) -> tuple[list[pa.Table], Steps]:
    """The blocks of a plan over the videos, and its steps."""
    from pipelines import tvl1
    from pipelines.datasets.catalog import read_catalog
    from pipelines.datasets.shards import ShardSettings
    from pipelines.extraction.graph import Steps
    from pipelines.extraction.plan import ExtractionSettings, make_plan
    from pipelines.extraction.work import iter_blocks

    tvl1.prewarm("cpu")
    settings = ExtractionSettings(shards=ShardSettings(videos_per_shard=config.videos_per_shard))
    catalog = read_catalog(config.videos, config.annotations, limit=config.limit)
    plan = make_plan(catalog, settings, videos=config.videos, output=folder, kernel=tvl1.kernel_target("cpu"))
    return list(iter_blocks(plan, {}, retry=False)), Steps.of(plan, backend="cpu")


def run_pool(pool: Pool, blocks: list[pa.Table], steps: Steps) -> float:
    """Wall seconds of the pool: a task is a shard, as it is in Ray."""
    started = time.perf_counter()
    for _ in pool.imap_unordered(extract_shard, [(block, steps) for block in blocks]):
        pass
    return time.perf_counter() - started


def extract_shard(task: tuple[pa.Table, Steps]) -> None:
    block, steps = task
    steps.make_shard(block)


def run_ray(blocks: list[pa.Table], steps: Steps, num_cpus: int) -> float:
    """Wall seconds of the graph."""
    from pipelines.extraction.tasks import Placement, run_graph

    started = time.perf_counter()
    for _ in run_graph(blocks, steps, Placement(num_cpus=num_cpus)):
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
