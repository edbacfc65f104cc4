"""Turn raw videos into shards of RGB frames and TV-L1 flow.

    python jobs/extract_flow.py                                            a few self-made videos, in seconds
    python jobs/extract_flow.py --videos DIR --output OUT                  folders of classes, or a flat folder
    python jobs/extract_flow.py --videos DIR --annotations train.csv val.csv --output s3://bucket/kinetics400
    ray job submit --working-dir . -- python jobs/extract_flow.py …        the same on a cluster

Interrupted, it goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.cluster import count_own_gpus, is_submitted
from jobs.command import as_given, locate_output, run_command
from jobs.extraction import (
    ExtractionFlags,
    Work,
    Workers,
    describe_output,
    find_rest,
    find_videos,
    follow,
    look_up,
    place,
    print_estimate,
    report_nothing_to_do,
    start_workers,
)
from jobs.extraction_log import RunLog, format_failures, format_summary
from pipelines import storage, tvl1
from pipelines.datasets import shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.motion_videos import write_motion_videos
from pipelines.datasets.records import DATASET
from pipelines.errors import SettingsError
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.lock import OutputLock, lock_output

if TYPE_CHECKING:
    from pipelines.extraction.flow_pool import FlowPool
    from pipelines.extraction.graph import Steps
    from pipelines.extraction.tasks import Placement

DEBUG_FOLDER = "out/debug"


@dataclass(frozen=True, kw_only=True)
class ExtractFlow(ExtractionFlags):
    """Turn raw videos into shards of RGB frames and TV-L1 flow. Without --videos, a few videos are made and used."""

    settings: ExtractionSettings = field(default_factory=ExtractionSettings)
    """What determines the bytes of the output."""

    flow_backend: Literal["auto", "cpu", "cuda", "opencv"] = "auto"
    """Where flow is computed. auto: as an output that was begun has it, else on GPUs if the cluster has any now, else
    on CPUs. cuda waits for GPUs to join."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.videos is not None and self.output is None:
            raise SettingsError("--videos is given but --output is not: say where the shards go")

    @property
    def backend(self) -> str:
        """Where to compute, as users say it."""
        return self.flow_backend


def main() -> None:
    """Parse, extract, report."""
    run_command(ExtractFlow, lambda config: run(prepare(config)), __doc__)


def prepare(config: ExtractFlow) -> ExtractFlow:
    """The configuration with the debug run's videos and output filled in; writes those videos."""
    if config.videos is not None:
        return config
    folder = Path(DEBUG_FOLDER)
    write_motion_videos(folder / "videos", videos_per_class=3, seed=0, num_frames=25)
    output = config.output or str(folder / "shards")
    shards = replace(config.settings.shards, videos_per_shard=min(config.settings.shards.videos_per_shard, 4))
    settings = replace(config.settings, shards=shards)
    return replace(config, videos=str(folder / "videos"), output=output, settings=settings)


def run(config: ExtractFlow) -> int:
    """Read the catalog, make the shards that are not there yet, write the tables; the exit status."""
    assert config.output, "filled in by prepare"
    output = locate_output(config.output)
    catalog = find_videos(config)
    if config.dry_run:  # writes nothing: it may look while another run holds the lock
        return dry_run(config, catalog, output)
    with lock_output(output) as lock, lock.stop_run_when_lost():
        work = look_up(config, output, partial(make_plan_of, config, catalog, output))
        if work and not work.blocks:
            report_nothing_to_do(work, config.output)
            return finish(work.plan, config.output, lock)
        num_shards = len(work.blocks) if work else -(-len(catalog.table) // config.settings.shards.videos_per_shard)
        with run_flow(config, output, num_tasks=num_shards) as flow:
            # After flow has started: the kernel's name, part of the fingerprint, is known only where it runs.
            if work is None or work.plan.kernel != flow.kernel:
                work = find_rest(config, make_plan_of(config, catalog, output, flow.kernel))
            log = extract(work, flow, lock)
        return finish(work.plan, config.output, lock, log)


def make_plan_of(config: ExtractFlow, catalog: Catalog, output: str, kernel: str) -> Plan:
    """The plan of this command, with flow by `kernel`."""
    assert config.videos, "filled in by prepare"
    return make_plan(catalog, config.settings, videos=config.videos, output=output, kernel=kernel)


@contextmanager
def run_flow(config: ExtractFlow, output: str, *, num_tasks: int) -> Iterator[Workers]:
    """Start Ray and what computes flow."""

    def start_pool(backend: str, placement: Placement) -> AbstractContextManager[FlowPool | None]:
        from pipelines.extraction.graph import start_actors

        return start_actors(config.settings, backend, placement)

    what = f"flow        {config.settings.flow_preset}"
    with start_workers(config, output, start_pool, num_tasks=num_tasks, warm=_warm, what=what) as workers:
        yield workers


def _warm(backend: str | None) -> None:
    if backend is not None:
        tvl1.prewarm(backend)
    import pipelines.extraction.graph  # noqa: F401


def extract(work: Work[Plan], flow: Workers, lock: OutputLock) -> RunLog:
    """Run the graph with progress lines; what was seen of it."""
    from pipelines.extraction import graph

    plan = work.plan
    print(f"output      {describe_output(plan)}", flush=True)
    log = RunLog(shards=len(plan.spans))
    remaining = graph.extract(
        plan, work.blocks, backend=flow.backend, placement=flow.placement, pool=flow.pool, claim=lock.claim,
        on_tally=log.add, tally_every_s=log.every_s,
    )  # fmt: skip
    follow(remaining, log, plan, flow.placement, lock)
    return log


def finish(plan: Plan, given: str, lock: OutputLock, log: RunLog | None = None) -> int:
    """Assemble the data set and draw its page, print the final table; the exit status.

    given: the output as the flag names it; log: of what was made now.
    """
    from pipelines.extraction import manifest
    from pipelines.pages import extraction

    lock.check()  # before what this run leaves of its own is settled: it may be another's by now
    page = storage.join(plan.output, "report.html")
    drawn = log is None and storage.exists(page) and storage.exists(storage.join(plan.output, DATASET))
    described = manifest.assemble(plan)
    if not drawn:
        extraction.write_extraction_report(plan.output, described)
    lock.check()
    # After the page: dataset.json says that all is there.
    manifest.finish(plan, described)
    print(format_summary(described, gpu_share=log.gpu_share if log else None))
    if described.quarantine_reasons:
        quarantine = storage.join(plan.output, "quarantine.parquet")
        print(format_failures(shards.read_table(quarantine), as_given(quarantine, given)))
    print(f"look at     {as_given(page, given)}")
    # Without one usable video there is nothing to go on with.
    return 0 if described.shards else 1


def dry_run(config: ExtractFlow, catalog: Catalog, output: str) -> int:
    """Print what the run would take, from a few videos that are extracted in this process.

    Ray is needed only where a cluster divides the work, or its GPUs compute flow.
    """
    if not is_submitted():
        backend, placement = place(config, output, count_own_gpus)
        if not placement.flow_actors:
            flow = Workers(backend, placement, None, tvl1.kernel_target(backend))
            plan, steps = steps_of(config, catalog, output, flow)
            return print_estimate(config, plan, steps, cpus=config.num_cpus or os.cpu_count())
    with run_flow(config, output, num_tasks=0) as flow:
        import ray

        cpus = config.num_cpus or ray.cluster_resources().get("CPU")
        plan, steps = steps_of(config, catalog, output, flow)
        return print_estimate(config, plan, steps, cpus=cpus)


def steps_of(config: ExtractFlow, catalog: Catalog, output: str, flow: Workers) -> tuple[Plan, Steps]:
    """The plan of this command, and what a task does."""
    from pipelines.extraction.graph import Steps

    plan = make_plan_of(config, catalog, output, flow.kernel)
    return plan, Steps.of(plan, backend=flow.backend, pool=flow.pool)


if __name__ == "__main__":
    main()
