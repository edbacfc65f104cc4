"""What Ray costs: extraction through the graph against a bare pool of processes that runs the same steps.

    python benchmarks/extraction.py                       60 UT-Interaction clips, two processes, three rounds

Both sides are warm before the clock runs (Ray started, workers and kernels loaded), both extract the same videos into
the same shards, and the rounds alternate. Prints wall seconds and the ratio.
"""

from __future__ import annotations

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
    from pipelines.extraction.graph import Steps

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


def main() -> None:
    config = tyro.cli(Benchmark)
    connect(num_cpus=config.processes)
    with tempfile.TemporaryDirectory() as folder:
        blocks, steps = prepare(config, folder)
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
