"""Turn raw videos into shards of RGB frames and TV-L1 flow.

    python jobs/extract_flow.py                                            a few self-made videos, in seconds
    python jobs/extract_flow.py --videos DIR --output OUT                  folders of classes, or a flat folder
    python jobs/extract_flow.py --videos DIR --annotations train.csv val.csv --output s3://bucket/kinetics400
    ray job submit --working-dir . -- python jobs/extract_flow.py …        the same on a cluster

Interrupted, it goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.cluster import check_gpus, connect, count_own_gpus, is_submitted
from jobs.command import as_given, locate_output, run_command
from jobs.extraction_log import RunLog, format_estimate, format_failures, format_summary
from pipelines import storage, tvl1
from pipelines.datasets import shards
from pipelines.datasets.catalog import Catalog, read_catalog
from pipelines.datasets.folders import Layout
from pipelines.datasets.motion_videos import write_motion_videos
from pipelines.datasets.records import DATASET
from pipelines.errors import CatalogError, SettingsError
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.extraction.work import backend_of, find_work, planned_kernel
from pipelines.lock import OutputLock, lock_output

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.extraction.flow_pool import FlowPool
    from pipelines.extraction.graph import Placement

DEBUG_FOLDER = "out/debug"
FLAGS = {"torch": "cuda"}  # what users call a backend that is named after what it is written in
COMPILING = "compiling   the flow kernel, once for each machine: some 15 s"


@dataclass(frozen=True, kw_only=True)
class ExtractFlow:
    """Turn raw videos into shards of RGB frames and TV-L1 flow. Without --videos, a few videos are made and used."""

    videos: str | None = None
    """Folder of videos, or one file, on disk or s3://. None: make a few videos under out/debug and use them."""
    output: str | None = None
    """Folder for the shards, on disk or s3://. Required with --videos. None: out/debug/shards."""
    annotations: tuple[str, ...] = ()
    """A CSV (path,label[,split]), Kinetics CSVs, or the folder of UCF-101's or HMDB-51's lists. None: folder names."""
    layout: Layout = "auto"
    """What the folders are, without --annotations. auto: decide by their names, and stop if that is ambiguous."""
    split: str | None = None
    """Take only this split (train, val, test, …). None: all."""
    fold: int = 1
    """Which of the three official splits of UCF-101 and HMDB-51 to use: 1, 2 or 3."""
    limit: int | None = None
    """Take at most this many videos, evenly spread over the catalog. None: all."""

    settings: ExtractionSettings = field(default_factory=ExtractionSettings)
    """What determines the bytes of the output."""

    flow_backend: Literal["auto", "cpu", "cuda", "opencv"] = "auto"
    """Where flow is computed. auto: as an output that was begun has it, else on GPUs if the cluster has any now, else
    on CPUs. cuda waits for GPUs to join."""
    num_cpus: int | None = None
    """CPUs to use at a time, with one task on each. None: all."""
    num_gpus: float | None = None
    """GPUs to use for flow. None: all."""
    gpus_per_actor: float = 1.0
    """Fraction of a GPU that one flow actor reserves; with 0.5, two share a GPU."""

    retry_quarantined: bool = False
    """Try quarantined videos again, and missing ones that have appeared; the other videos of their shards are kept."""
    verify: bool = False
    """Check every shard against its hash first; those that do not match are made again."""
    dry_run: bool = False
    """Only print the plan, with time, bytes and cost extrapolated from a few videos."""
    dry_run_samples: int = 4
    """Number of videos that --dry-run extracts."""
    cpu_hour_price: float = 0.04
    """Dollars per CPU and hour, for --dry-run."""

    def __post_init__(self) -> None:
        if self.videos is not None and self.output is None:
            raise SettingsError("--videos is given but --output is not: say where the shards go")
        if self.layout != "auto" and self.annotations:
            raise SettingsError(
                f"--layout {self.layout} says what folders are, but --annotations are given: leave one out"
            )
        if self.num_cpus is not None and self.num_cpus < 1:
            raise SettingsError(f"--num-cpus is {self.num_cpus}: give at least 1, or leave it out for all")
        if not self.gpus_per_actor > 0:
            raise SettingsError(
                f"--gpus-per-actor is {self.gpus_per_actor}: give a share of a GPU above 0, such as 0.5"
            )
        if self.dry_run and self.retry_quarantined:
            raise SettingsError("--dry-run and --retry-quarantined exclude each other: the estimate is of a whole run")
        if self.dry_run_samples < 1:
            raise SettingsError(f"--dry-run-samples is {self.dry_run_samples}: give at least 1")
        for uri in (self.videos, self.output, *self.annotations):
            if uri is not None:
                storage.absolute(uri)


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
    with lock_output(output) as lock:
        work = look_up(config, catalog, output)
        if work and not work.blocks:
            print(f"to do       nothing: all {len(work.plan.spans)} shards of {config.output} are done", flush=True)
            return finish(work.plan, config.output, lock)
        num_shards = len(work.blocks) if work else -(-len(catalog.table) // config.settings.shards.videos_per_shard)
        with run_flow(config, output, num_tasks=num_shards) as flow:
            # After flow has started: the kernel's name, part of the fingerprint, is known only where it runs.
            if work is None or work.plan.kernel != flow.kernel:
                work = find_rest(config, make_plan_of(config, catalog, output, flow.kernel))
            log = extract(work, flow, lock)
        return finish(work.plan, config.output, lock, log)


def find_videos(config: ExtractFlow) -> Catalog:
    """The catalog; prints what was found."""
    assert config.videos, "filled in by prepare"
    try:
        catalog = read_catalog(
            config.videos,
            list(config.annotations) or None,
            split=config.split,
            limit=config.limit,
            fold=config.fold,
            layout=config.layout,
        )
    except OSError as error:
        raise CatalogError(f"the videos or their annotations cannot be read: {error}") from error
    print_catalog(config.videos, catalog)
    return catalog


def print_catalog(videos: str, catalog: Catalog) -> None:
    """What was found, so that wrong labels and files that are passed over are seen before the work."""
    print(f"videos      {videos}: {describe_catalog(catalog)}")
    print(f"classes     {catalog.describe_classes()}")
    for files in catalog.left_out:
        print(f"left out    {files}", flush=True)


def describe_catalog(catalog: Catalog) -> str:
    """`120 videos (train 60, test 60), 6 classes; 2 missing; from a CSV of paths`."""
    splits = Counter(catalog.table["split"].to_pylist())
    sizes = ", ".join(f"{name} {count:,}" for name, count in splits.items())
    missing = catalog.table["path"].null_count
    text = f"{len(catalog.table):,} videos ({sizes}), {len(catalog.classes)} classes, from {catalog.source}"
    return f"{text}; {missing:,} missing" if missing else text


@dataclass(frozen=True)
class Work:
    """A plan, and the blocks of the shards that its output lacks."""

    plan: Plan
    blocks: list[pa.Table]


def make_plan_of(config: ExtractFlow, catalog: Catalog, output: str, kernel: str) -> Plan:
    """The plan of this command, with flow by `kernel`."""
    assert config.videos, "filled in by prepare"
    return make_plan(catalog, config.settings, videos=config.videos, output=output, kernel=kernel)


def look_up(config: ExtractFlow, catalog: Catalog, output: str) -> Work | None:
    """What is left to do if flow is computed as the output was begun, for which no Ray is needed; None: not begun."""
    kernel = planned_kernel(output)
    if kernel is None or config.flow_backend not in ("auto", FLAGS.get(backend_of(kernel), backend_of(kernel))):
        return None
    return find_rest(config, make_plan_of(config, catalog, output, kernel))


def find_rest(config: ExtractFlow, plan: Plan) -> Work:
    """What the output lacks of the plan; begins one that was not begun."""
    if config.verify:
        print("checking    every shard against its hash", flush=True)
    return Work(plan, find_work(plan, retry=config.retry_quarantined, verify=config.verify))


def place(config: ExtractFlow, output: str, count_gpus: Callable[[], float]) -> tuple[str, Placement]:
    """The flow backend that --flow-backend means where there are so many GPUs, and where the steps run."""
    from pipelines.extraction.graph import Placement

    wanted: str = config.flow_backend
    begun = planned_kernel(output) if wanted == "auto" else None
    if begun:  # GPUs may have come or gone since, and flow of two kernels does not mix
        wanted = FLAGS.get(backend_of(begun), backend_of(begun))
    gpus = 0.0
    if wanted in ("auto", "cuda"):
        gpus = count_gpus() if config.num_gpus is None else config.num_gpus
    if wanted == "auto":
        # Decided here: a step that asks for a GPU where there is none waits, for Ray does not fall back.
        wanted = "cuda" if gpus else "cpu"
    if wanted != "cuda":
        return wanted, Placement(num_cpus=config.num_cpus)
    actors = int(gpus / config.gpus_per_actor)
    if actors < 1:
        reason = "the output was begun with flow on GPUs" if begun else "--flow-backend is cuda"
        raise SettingsError(
            f"{reason}, and {gpus:g} GPUs with --gpus-per-actor {config.gpus_per_actor:g} leave no flow actor: say by "
            "--num-gpus how many GPUs the cluster will scale up to, or take --flow-backend cpu for another --output"
        )
    return "torch", Placement(num_cpus=config.num_cpus, flow_actors=actors, gpus_per_actor=config.gpus_per_actor)


@dataclass(frozen=True)
class RunningFlow:
    """What computes flow: a backend in the tasks, or the actors of a pool, and the kernel that it has there."""

    backend: str
    placement: Placement
    pool: FlowPool | None
    kernel: str


@contextmanager
def run_flow(config: ExtractFlow, output: str, *, num_tasks: int) -> Iterator[RunningFlow]:
    """Start Ray and what computes flow, and ask what its kernel is compiled for there: a head node may differ.

    num_tasks: that the graph will have, of which each CPU runs one at a time.
    """
    print(f"ray         {connect(num_cpus=config.num_cpus)}", flush=True)
    import ray

    backend, placement = place(config, output, lambda: float(ray.cluster_resources().get("GPU", 0.0)))
    if placement.flow_actors:
        check_gpus(placement.flow_actors * placement.gpus_per_actor)
    elif not tvl1.is_compiled(backend):
        print(COMPILING, flush=True)
    # Before this process imports the graph, and while actors load torch and open their GPU.
    num_workers = min(num_tasks, int(config.num_cpus or ray.cluster_resources().get("CPU", 0)))
    _warm_workers(None if placement.flow_actors else backend, max(1, num_workers))
    from pipelines.extraction.fleet import find_fleet
    from pipelines.extraction.graph import start_actors

    planned = planned_kernel(output)
    with start_actors(config.settings, backend, placement) as pool:
        if pool:
            kernel = pool.kernel(planned)
        else:
            fleet = find_fleet(backend, planned)
            kernel, placement = fleet.kernel, replace(placement, left_out=tuple(sorted(fleet.others)))
            for node, other in fleet.others.items():
                print(f"left out    node {node}, whose flow would differ: {other}", flush=True)
        actors = placement.flow_actors or "no"
        print(f"flow        {config.settings.flow_preset} on {kernel}; {actors} GPU actors", flush=True)
        yield RunningFlow(backend, placement, pool, kernel)


def _warm_workers(backend: str | None, count: int) -> None:
    """Have Ray start the processes that will extract, and these load what they need."""
    import ray

    from pipelines.extraction.fleet import select_nodes

    selector = select_nodes() if backend else {}
    remote = ray.remote(num_cpus=1, label_selector=selector)(_warm)
    for _ in range(count):
        # Nobody waits for them: a worker that is late loads by itself.
        remote.remote(backend)


def _warm(backend: str | None) -> None:
    if backend is not None:
        tvl1.prewarm(backend)
    import pipelines.extraction.graph  # noqa: F401


def extract(work: Work, flow: RunningFlow, lock: OutputLock) -> RunLog:
    """Run the graph with progress lines; what was seen of it."""
    from pipelines.extraction import graph

    plan = work.plan
    print(f"output      {plan.output}: {len(plan.spans)} shards of {len(plan.table)} videos", flush=True)
    log = RunLog(shards=len(plan.spans))
    remaining = graph.extract(
        plan, work.blocks, backend=flow.backend, placement=flow.placement, pool=flow.pool, on_tally=log.add,
        tally_every_s=log.every_s,
    )  # fmt: skip
    try:
        for left in remaining:
            # At each shard: whoever has taken the lock over writes here too.
            lock.check()
            log.update(left)
    finally:
        # Of a run that is stopped or fails, too: it went at some speed until then.
        log.write(plan.output, flow.placement)
    return log


def finish(plan: Plan, given: str, lock: OutputLock, log: RunLog | None = None) -> int:
    """Assemble the data set and draw its page, print the final table; the exit status.

    given: the output as the flag names it; log: of what was made now.
    """
    from pipelines.extraction import manifest
    from pipelines.pages import extraction

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
            flow = RunningFlow(backend, placement, None, tvl1.kernel_target(backend))
            return print_estimate(config, catalog, output, flow, cpus=config.num_cpus or os.cpu_count())
    with run_flow(config, output, num_tasks=0) as flow:
        import ray

        cpus = config.num_cpus or ray.cluster_resources().get("CPU")
        return print_estimate(config, catalog, output, flow, cpus=cpus)


def print_estimate(config: ExtractFlow, catalog: Catalog, output: str, flow: RunningFlow, *, cpus: float | None) -> int:
    """Extract the samples one after another, and print what follows for all videos on so many CPUs."""
    from pipelines.extraction.estimate import estimate
    from pipelines.extraction.graph import Steps

    if not cpus:
        raise SettingsError("--dry-run on a cluster without workers now: say by --num-cpus how many CPUs it will have")
    plan = make_plan_of(config, catalog, output, flow.kernel)
    print(f"output      {output}: {len(plan.spans)} shards of {len(plan.table)} videos", flush=True)
    if flow.pool is None and not tvl1.is_compiled(flow.backend):
        print(COMPILING, flush=True)
    print(f"sampling    up to {config.dry_run_samples} videos, for about half a minute", flush=True)
    cost = estimate(plan, Steps.of(plan, backend=flow.backend, pool=flow.pool), num_samples=config.dry_run_samples)
    print(format_estimate(cost, cpus=cpus, cpu_hour_price=config.cpu_hour_price))
    return 0


if __name__ == "__main__":
    main()
