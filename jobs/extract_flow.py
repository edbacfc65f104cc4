"""Turn raw videos into shards of RGB frames and TV-L1 flow.

    python jobs/extract_flow.py                                            a few self-made videos, in seconds
    python jobs/extract_flow.py --videos DIR --output OUT                  folders of classes, or a flat folder
    python jobs/extract_flow.py --videos DIR --annotations train.csv val.csv --output s3://bucket/kinetics400
    ray job submit --working-dir . -- python jobs/extract_flow.py …        the same on a cluster

Interrupted, it goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.cluster import check_gpus, connect
from jobs.command import locate_output, run_command
from jobs.extraction_log import RunLog, format_estimate, format_summary
from pipelines import storage
from pipelines.datasets.catalog import Catalog, read_catalog
from pipelines.datasets.folders import Layout
from pipelines.datasets.motion_videos import write_motion_videos
from pipelines.errors import CatalogError, SettingsError
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan, planned_backend
from pipelines.lock import OutputLock, lock_output

if TYPE_CHECKING:
    from pipelines.extraction.flow_pool import FlowPool
    from pipelines.extraction.graph import Placement

DEBUG_FOLDER = "out/debug"
BACKEND_FLAGS = {"torch": "cuda"}  # what users call a backend that is named after what it is written in


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
    settings = config.settings
    assert config.videos, "filled in by prepare"
    assert config.output, "filled in by prepare"
    output = locate_output(config.output)
    annotations = list(config.annotations) or None
    try:
        catalog = read_catalog(
            config.videos,
            annotations,
            split=config.split,
            limit=config.limit,
            fold=config.fold,
            layout=config.layout,
        )
    except OSError as error:
        raise CatalogError(f"the videos or their annotations cannot be read: {error}") from error
    print_catalog(config.videos, catalog)
    # A dry run writes nothing: it may look while another run holds the lock.
    with nullcontext() if config.dry_run else lock_output(output) as lock:
        print(f"ray         {connect(num_cpus=config.num_cpus)}")
        with run_flow(settings, *place(config, output)) as flow:
            # After flow has started: the kernel's name, part of the fingerprint, is known only where it runs.
            plan = make_plan(catalog, settings, videos=config.videos, output=output, kernel=flow.kernel)
            actors = flow.placement.flow_actors or "no"
            print(f"flow        {settings.flow_preset} on {flow.kernel}; {actors} GPU actors")
            print(f"output      {output}: {len(plan.spans)} shards of {len(plan.table)} videos", flush=True)
            return extract(config, plan, flow, lock) if lock else dry_run(config, plan, flow)


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


def place(config: ExtractFlow, output: str) -> tuple[str, Placement]:
    """The flow backend that --flow-backend means on the cluster at hand, and where the steps run."""
    import ray

    from pipelines.extraction.graph import Placement

    gpus = ray.cluster_resources().get("GPU", 0.0) if config.num_gpus is None else config.num_gpus
    wanted: str = config.flow_backend
    if wanted == "auto":
        # Decided here: a step that asks for a GPU where there is none waits, for Ray does not fall back. GPUs may have
        # come or gone since the output was begun, and flow of two kernels does not mix.
        begun = planned_backend(output)
        wanted = BACKEND_FLAGS.get(begun, begun) if begun else "cuda" if gpus else "cpu"
    if wanted != "cuda":
        return wanted, Placement(num_cpus=config.num_cpus)
    actors = int(gpus / config.gpus_per_actor)
    if actors < 1:
        reason = "the output was begun with flow on GPUs" if config.flow_backend == "auto" else "--flow-backend is cuda"
        raise SettingsError(
            f"{reason}, and {gpus:g} GPUs with --gpus-per-actor {config.gpus_per_actor:g} leave no flow actor: say by "
            "--num-gpus how many GPUs the cluster will scale up to, or take --flow-backend cpu for another --output"
        )
    check_gpus(gpus)
    return "torch", Placement(num_cpus=config.num_cpus, flow_actors=actors, gpus_per_actor=config.gpus_per_actor)


@dataclass(frozen=True)
class RunningFlow:
    """What computes flow: a backend in the tasks, or the actors of a pool, and the kernel that it has there."""

    backend: str
    placement: Placement
    pool: FlowPool | None
    kernel: str


@contextmanager
def run_flow(settings: ExtractionSettings, backend: str, placement: Placement) -> Iterator[RunningFlow]:
    """Start what computes flow, and ask what its kernel is compiled for where it runs: a head node may differ."""
    import ray

    from pipelines.extraction.graph import start_actors

    with start_actors(settings, backend, placement) as pool:
        if pool:  # while the actors load torch and open their GPU, which takes the longest
            _warm_workers(placement.num_cpus)
        try:
            kernel = pool.kernel() if pool else ray.get(ray.remote(_prewarm).remote(backend))
        except ray.exceptions.RayTaskError as error:
            # The worker's own error says what to mend; Ray's is about a task.
            raise (error.cause or error) from error
        yield RunningFlow(backend, placement, pool, str(kernel))


def _warm_workers(num_cpus: int | None) -> None:
    """Have Ray start the processes that will extract, and these import what they need."""
    import ray

    count = int(num_cpus or ray.cluster_resources().get("CPU", 0))
    remote = ray.remote(num_cpus=1)(_import_steps)
    for _ in range(count):
        # Nobody waits for them: the actors take longer, and a worker that is late imports by itself.
        remote.remote()


def _import_steps() -> None:
    import pipelines.extraction.graph  # noqa: F401


def _prewarm(backend: str) -> str:
    from pipelines import tvl1

    tvl1.prewarm(backend)
    return tvl1.kernel_target(backend)


def extract(config: ExtractFlow, plan: Plan, flow: RunningFlow, lock: OutputLock) -> int:
    """Run the graph with progress lines, assemble the data set, print the final table."""
    from pipelines.extraction import graph, manifest
    from pipelines.pages import extraction

    log = RunLog(shards=len(plan.spans))
    remaining = graph.extract(
        plan,
        backend=flow.backend,
        placement=flow.placement,
        pool=flow.pool,
        retry=config.retry_quarantined,
        verify=config.verify,
        on_tally=log.add,
    )
    try:
        for left in remaining:
            # At each shard: whoever has taken the lock over writes here too.
            lock.check()
            log.update(left)
    finally:
        # Of a run that is stopped or fails, too: it went at some speed until then.
        log.write(plan.output, flow.placement)
    described = manifest.assemble(plan)
    page = extraction.write_extraction_report(plan.output, described)
    lock.check()
    # After the page: dataset.json says that all is there.
    manifest.finish(plan, described)
    print(format_summary(described, gpu_share=log.gpu_share))
    print(f"look at     {page}")
    # Without one usable video there is nothing to go on with.
    return 0 if described.shards else 1


def dry_run(config: ExtractFlow, plan: Plan, flow: RunningFlow) -> int:
    """Print what the run would take, from a few videos that are extracted in this process."""
    import ray

    from pipelines.extraction.estimate import estimate
    from pipelines.extraction.graph import Steps

    # The samples are extracted here, one after another; the cluster only divides the time.
    cpus = config.num_cpus or ray.cluster_resources().get("CPU")
    if not cpus:
        raise SettingsError("--dry-run on a cluster without workers now: say by --num-cpus how many CPUs it will have")
    cost = estimate(plan, Steps.of(plan, backend=flow.backend, pool=flow.pool), num_samples=config.dry_run_samples)
    print(format_estimate(cost, cpus=cpus, cpu_hour_price=config.cpu_hour_price))
    return 0


if __name__ == "__main__":
    main()
