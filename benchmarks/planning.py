"""What a large catalog costs: rows planned and sent through the graph with steps that do nothing.

    python benchmarks/planning.py                         up to 250,000 rows

Each size runs in a process of its own. Prints seconds to lay out the plan, to the first shard and to the last, and the
driver's peak memory: linear in rows, or not.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from dataclasses import dataclass

import pyarrow as pa
import tyro

from jobs.cluster import connect
from jobs.extraction_log import format_table


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Plan and run catalogs of several sizes with steps that do nothing."""

    rows: tuple[int, ...] = (31_250, 62_500, 125_000, 250_000)
    """Videos in the catalog."""
    videos_per_shard: int = 32
    """Videos in a shard, and rows in a block."""


def main() -> None:
    config = tyro.cli(Benchmark)
    results = []
    for rows in config.rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append((f"{rows:,}", *pool.apply(measure, (rows, config.videos_per_shard))))
    print(format_table(("rows", "plan s", "first shard s", "all shards s", "ms a row", "driver MB"), results))


def measure(rows: int, videos_per_shard: int) -> tuple[str, ...]:
    """One size, in a fresh process."""
    connect(num_cpus=2)
    import ray

    from pipelines.datasets.catalog import SCHEMA, Catalog
    from pipelines.datasets.shards import ShardSettings
    from pipelines.extraction.graph import Steps
    from pipelines.extraction.plan import ExtractionSettings, make_plan
    from pipelines.extraction.tasks import Placement, run_graph
    from pipelines.extraction.work import iter_blocks

    class IdleSteps(Steps):
        def make_shard(self, batch: pa.Table) -> pa.Table:
            return pa.table({"shard": [batch["shard"][0].as_py()], "videos": [len(batch)], "bytes": [0]})

    started = time.perf_counter()
    columns = {
        "id": [f"video{index:07d}" for index in range(rows)],
        "path": [f"/videos/class/video{index:07d}_000010_000020.mp4" for index in range(rows)],
        "label": [index % 400 for index in range(rows)],
        "class_name": [f"class {index % 400}" for index in range(rows)],
        "split": ["train"] * rows,
        "start": [None] * rows,
        "end": [None] * rows,
    }
    catalog = Catalog(pa.table(columns, schema=SCHEMA), tuple(f"class {i}" for i in range(400)), "made up")
    settings = ExtractionSettings(shards=ShardSettings(videos_per_shard=videos_per_shard))
    plan = make_plan(catalog, settings, videos="/videos", output="/nowhere", kernel="none")
    steps = IdleSteps(output="", settings=settings, backend="none", kernel="none", fingerprint="")
    blocks = list(iter_blocks(plan, {}, retry=False))
    planned = time.perf_counter()
    shards = run_graph(blocks, steps, Placement())
    next(shards)
    first = time.perf_counter()
    committed = 1 + sum(1 for _ in shards)
    done = time.perf_counter()
    ray.shutdown()
    assert committed == len(plan.spans)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    times = (planned - started, first - planned, done - planned)
    return (*(f"{seconds:.1f}" for seconds in times), f"{1000 * (done - started) / rows:.2f}", str(peak))


if __name__ == "__main__":
    main()
