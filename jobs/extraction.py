"""What jobs that extract something from videos share: flags, catalog, where they compute, how they tell progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

import tyro

from jobs.cluster import check_gpus, connect
from jobs.extraction_log import RunLog, format_estimate
from pipelines import storage, tvl1
from pipelines.datasets.catalog import Catalog, read_catalog
from pipelines.datasets.folders import Layout
from pipelines.errors import CatalogError, SettingsError
from pipelines.extraction.work import PlannedWork, backend_of, find_work, planned_kernel
from pipelines.formatting import format_count
from pipelines.lock import OutputLock

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.extraction.tasks import Placement, Remaining, TaskSteps

P = TypeVar("P", bound=PlannedWork)

FLAGS = {"torch": "cuda"}  # what users call a backend that is named after what it is written in
COMPILING = "compiling   the flow kernel, once for each machine: some 15 s"


@dataclass(frozen=True, kw_only=True)
class ExtractionFlags:
    """Which videos, where to, on what, and what of it again."""

    LAYOUT_FLAG: ClassVar[str] = "--layout"
    ON_CPUS: ClassVar[str] = "--flow-backend cpu"  # what has a new output computed on CPUs

    videos: str | None = None
    """Folder of videos, or one file, on disk or s3://. None: make a few videos under out/debug and use them."""
    output: str | None = None
    """Folder for the shards, on disk or s3://. Required with --videos. None: out/debug/shards."""
    annotations: tuple[str, ...] = ()
    """A CSV (path,label[,split]), Kinetics CSVs, or the folder of UCF-101's or HMDB-51's lists. None: folder names."""
    folder_layout: Annotated[Layout, tyro.conf.arg(name="layout")] = "auto"
    """What the folders are, without --annotations. auto: decide by their names, and stop if that is ambiguous."""
    split: str | None = None
    """Take only this split (train, val, test, …). None: all."""
    fold: int = 1
    """Which of the three official splits of UCF-101 and HMDB-51 to use: 1, 2 or 3."""
    limit: int | None = None
    """Take at most this many videos, evenly spread over the catalog. None: all."""

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
        if self.folder_layout != "auto" and self.annotations:
            raise SettingsError(
                f"{self.LAYOUT_FLAG} {self.folder_layout} says what folders are, but --annotations are given: leave "
                "one out"
            )
        if self.num_cpus is not None and self.num_cpus < 1:
            raise SettingsError(f"--num-cpus is {self.num_cpus}: give at least 1, or leave it out for all")
        # Ray gives shares of one GPU, or whole ones.
        if not self.gpus_per_actor > 0 or (self.gpus_per_actor > 1 and self.gpus_per_actor % 1):
            raise SettingsError(
                f"--gpus-per-actor is {self.gpus_per_actor}: give a share of a GPU, such as 0.5, or a whole number"
            )
        if self.dry_run and self.retry_quarantined:
            raise SettingsError("--dry-run and --retry-quarantined exclude each other: the estimate is of a whole run")
        if self.dry_run_samples < 1:
            raise SettingsError(f"--dry-run-samples is {self.dry_run_samples}: give at least 1")
        for uri in (self.videos, self.output, *self.annotations):
            if uri is not None:
                storage.absolute(uri)

    @property
    def backend(self) -> str:
        """Where to compute, as users say it: auto, cpu, cuda or opencv."""
        raise NotImplementedError


def find_videos(config: ExtractionFlags) -> Catalog:
    """The catalog; prints what was found."""
    assert config.videos, "there is a source"
    try:
        catalog = read_catalog(
            config.videos,
            list(config.annotations) or None,
            split=config.split,
            limit=config.limit,
            fold=config.fold,
            layout=config.folder_layout,
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
    text = (
        f"{format_count(len(catalog.table), 'video')} ({sizes}), "
        f"{format_count(len(catalog.classes), 'class')}, from {catalog.source}"
    )
    return f"{text}; {missing:,} missing" if missing else text


@dataclass(frozen=True)
class Work(Generic[P]):
    """A plan, and the blocks of the shards that its output lacks."""

    plan: P
    blocks: list[pa.Table]


def find_rest(config: ExtractionFlags, plan: P) -> Work[P]:
    """What the output lacks of the plan; begins one that was not begun."""
    if config.verify:
        print("checking    every shard against its hash", flush=True)
    return Work(plan, find_work(plan, retry=config.retry_quarantined, verify=config.verify))


def look_up(config: ExtractionFlags, output: str, make_plan: Callable[[str], P]) -> Work[P] | None:
    """What is left to do if it is computed as the output was begun, for which no Ray is needed; None: not begun."""
    kernel = planned_kernel(output)
    if kernel is None or config.backend not in ("auto", FLAGS.get(backend_of(kernel), backend_of(kernel))):
        return None
    return find_rest(config, make_plan(kernel))


def report_nothing_to_do(work: Work[P], given: str) -> None:
    """Say so; `given` is the output as the flag names it."""
    print(f"to do       nothing: {format_count(len(work.plan.spans), 'shard')} of {given} done", flush=True)


def describe_output(plan: PlannedWork) -> str:
    """`out: 4 shards of 120 videos`."""
    return f"{plan.output}: {format_count(len(plan.spans), 'shard')} of {format_count(len(plan.table), 'video')}"


def place(config: ExtractionFlags, output: str, count_gpus: Callable[[], float]) -> tuple[str, Placement]:
    """The backend that the flags mean where there are so many GPUs, and where the steps run."""
    from pipelines.extraction.tasks import Placement

    wanted = config.backend
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
        reason = "the output was begun on GPUs" if begun else "GPUs are asked for"
        raise SettingsError(
            f"{reason}, and {gpus:g} GPUs with --gpus-per-actor {config.gpus_per_actor:g} leave no actor: say by "
            f"--num-gpus how many GPUs the cluster will scale up to, or take {config.ON_CPUS} for another --output"
        )
    return "torch", Placement(num_cpus=config.num_cpus, flow_actors=actors, gpus_per_actor=config.gpus_per_actor)


@dataclass(frozen=True)
class Workers:
    """What computes: a backend in the tasks, or the actors of a pool, and the kernel that it has there."""

    backend: str
    placement: Placement
    pool: Any  # an ActorPool
    kernel: str


StartPool = Callable[[str, "Placement"], AbstractContextManager[Any]]


@contextmanager
def start_workers(
    config: ExtractionFlags,
    output: str,
    start_pool: StartPool,
    *,
    num_tasks: int,
    warm: Callable[[str | None], None],
    load: Callable[[str], str] | None = None,
    compiles: bool = True,
    what: str,
) -> Iterator[Workers]:
    """Start Ray and what computes, and ask what its kernel is compiled for there: a head node may differ.

    num_tasks: that the graph will have, of which each CPU runs one at a time.
    start_pool: the actors of a backend and placement, in the background; None where it has none.
    warm: what a worker process loads before its first task, of a backend that computes in it.
    load: loads the kernel of a backend on a node and names it. None: that of flow.
    compiles: whether that may take long where it was never done.
    what: a line about what is computed.
    """
    print(f"ray         {connect(num_cpus=config.num_cpus)}", flush=True)
    import ray

    backend, placement = place(config, output, lambda: float(ray.cluster_resources().get("GPU", 0.0)))
    if placement.flow_actors:
        check_gpus(placement.flow_actors * placement.gpus_per_actor)
    elif compiles and not tvl1.is_compiled(backend):
        print(COMPILING, flush=True)
    # Before this process imports the graph, and while actors load torch and open their GPU.
    num_workers = min(num_tasks, int(config.num_cpus or ray.cluster_resources().get("CPU", 0)))
    _warm_workers(warm, None if placement.flow_actors else backend, max(1, num_workers))
    from pipelines.extraction.fleet import find_fleet, load_kernel

    planned = planned_kernel(output)
    with start_pool(backend, placement) as pool:
        if pool:
            kernel = pool.kernel(planned)
        else:
            fleet = find_fleet(backend, planned, load or load_kernel)
            kernel, placement = fleet.kernel, replace(placement, left_out=tuple(sorted(fleet.others)))
            for node, other in fleet.others.items():
                print(f"left out    node {node}, whose flow would differ: {other}", flush=True)
        actors = placement.flow_actors or "no"
        print(f"{what} on {kernel}; {actors} GPU actors", flush=True)
        yield Workers(backend, placement, pool, kernel)


def _warm_workers(warm: Callable[[str | None], None], backend: str | None, count: int) -> None:
    """Have Ray start the processes that will extract, and these load what they need."""
    import ray

    from pipelines.extraction.fleet import select_nodes

    selector = select_nodes() if backend else {}
    remote = ray.remote(num_cpus=1, label_selector=selector)(warm)
    for _ in range(count):
        # Nobody waits for them: a worker that is late loads by itself.
        remote.remote(backend)


def follow(
    remaining: Iterable[Remaining], log: RunLog, plan: PlannedWork, placement: Placement, lock: OutputLock
) -> None:
    """Run the graph to its end with progress lines; leaves a record of the run."""
    try:
        for left in remaining:
            # At each shard: whoever has taken the lock over writes here too.
            lock.check()
            log.update(left)
    finally:
        # Of a run that is stopped or fails, too: it went at some speed until then.
        log.write(plan.output, placement)


def print_estimate(
    config: ExtractionFlags, plan: PlannedWork, steps: TaskSteps, *, cpus: float | None, compiles: bool = True
) -> int:
    """Extract a few videos one after another, and print what follows for all of them on so many CPUs."""
    from pipelines.extraction.estimate import estimate

    if not cpus:
        raise SettingsError("--dry-run on a cluster without workers now: say by --num-cpus how many CPUs it will have")
    print(f"output      {describe_output(plan)}", flush=True)
    if steps.pool is None and compiles and not tvl1.is_compiled(steps.backend):
        print(COMPILING, flush=True)
    print(f"sampling    up to {config.dry_run_samples} videos, for about half a minute", flush=True)
    cost = estimate(plan, steps, num_samples=config.dry_run_samples)
    print(format_estimate(cost, cpus=cpus, cpu_hour_price=config.cpu_hour_price))
    return 0
