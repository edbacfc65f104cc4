"""I3D's features of every window of videos, as projects publish and load them: straight from videos, or from shards.

    python jobs/extract_features.py --videos DIR --rgb W --flow W --output OUT
    python jobs/extract_features.py --videos DIR --rgb W --flow W --preset thumos14 --output s3://bucket/thumos14
    python jobs/extract_features.py --data SHARDS --rgb RUN --flow RUN --output OUT

W is a run, a checkpoint or released weights. OUT/features holds Parquet files, one row per window, stream and crop, or
the .npy files of a preset; OUT/features.json says how they were made. Interrupted, it goes on where it stopped when the
same command is run again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jobs.cluster import check_precision, count_own_gpus, is_submitted
from jobs.command import as_given, locate_output, run_command, with_preset
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
from jobs.extraction_log import RunLog, format_failures, format_table
from models.input_spec import FRAMES_PER_SECOND, Stream
from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.catalog import Catalog
from pipelines.datasets.folders import Layout
from pipelines.datasets.records import describe_rate
from pipelines.errors import SettingsError
from pipelines.features.compute import FeatureNetworks
from pipelines.features.plan import FeaturePlan, Limits, Stored, make_task, plan_stored, plan_videos
from pipelines.features.presets import PRESETS, PresetName
from pipelines.features.records import FeatureSet
from pipelines.features.settings import FeatureSettings
from pipelines.features.sidecar import SIDECAR, describe_features
from pipelines.features.task import (
    FeatureTask,
    describe_decoding,
    describe_flow,
    find_kernel,
    load_flow_kernel,
    load_no_kernel,
)
from pipelines.formatting import format_bytes, format_count
from pipelines.lock import OutputLock, lock_output
from pipelines.training.weights_files import Which
from pipelines.tvl1.params import FlowPreset

if TYPE_CHECKING:
    from pipelines.extraction.tasks import Placement
    from pipelines.features.graph import FeatureSteps
    from pipelines.features.pool import FeaturePool


@dataclass(frozen=True, kw_only=True)
class ExtractFeatures(ExtractionFlags):
    """Write I3D's features of the windows of videos."""

    LAYOUT_FLAG: ClassVar[str] = "--folder-layout"
    ON_CPUS: ClassVar[str] = "--num-gpus 0"

    videos: str | None = None
    """Folder of videos, or one file, on disk or s3://. Give this or --data."""
    output: str | None = None
    """Folder for the features, on disk or s3://."""
    folder_layout: Layout = "auto"
    """What the folders are, without --annotations. auto: decide by their names, and stop if that is ambiguous."""
    split: str | None = None
    """Take only this split (train, val, test, …), of --data too. None: all."""
    data: str | None = None
    """Shards of jobs/extract_flow.py to read in place of videos, on disk or s3://."""

    rgb: str | None = None
    """I3D of the RGB stream: a run, a checkpoint or released weights."""
    flow: str | None = None
    """I3D of the flow stream, in the same forms."""
    which: Which = "last"
    """Which checkpoint of a run."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks. bf16 is faster on processors and GPUs that have it; fp16 needs a GPU."""

    preset: PresetName | None = None
    """Settings that published features were made with; flags that are given win. docs/features says more of each."""
    settings: FeatureSettings = field(default_factory=FeatureSettings)
    """What features are."""
    flow_preset: FlowPreset = "faithful"
    """TV-L1 settings: like OpenCV's (faithful), better (quality), or faster (fast). Of --videos."""
    limits: Limits = field(default_factory=Limits)
    """What a video may cost. Of --videos."""
    videos_per_shard: int = 32
    """Videos that are committed together; a machine that dies loses at most one shard's work."""

    num_gpus: float | None = None
    """GPUs to use for flow and networks. None: as an output that was begun has it, else all. 0: CPUs."""
    gpus_per_actor: float = 1.0
    """Fraction of a GPU that one actor reserves; with 0.5, two share a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.videos is None) == (self.data is None):
            raise SettingsError("give --videos or --data: a folder of videos, or shards of jobs/extract_flow.py")
        if self.output is None:
            raise SettingsError("--output is not given: say where the features go")
        if self.data is not None and (self.annotations or self.limit is not None or self.folder_layout != "auto"):
            raise SettingsError("--annotations, --limit and --folder-layout go with --videos, not with --data")
        if self.data is not None and (self.flow_preset != "faithful" or self.limits != Limits()):
            raise SettingsError(
                "--flow-preset and the limits of decoding go with --videos: --data has its frames and flow already"
            )
        if self.videos_per_shard < 1:
            raise SettingsError(f"--videos-per-shard is {self.videos_per_shard}: it must be at least 1")
        self.settings.chosen_streams(tuple(self.uris))
        for uri in (self.data, *self.uris.values()):
            if uri is not None:
                storage.absolute(uri)

    @property
    def given(self) -> dict[Stream, str]:
        """Where the network of each stream is, as the user said it."""
        named: dict[Stream, str | None] = {"rgb": self.rgb, "flow": self.flow}
        return {stream: uri for stream, uri in named.items() if uri is not None}

    @property
    def uris(self) -> dict[Stream, str]:
        """The same for any node and working directory."""
        return {stream: storage.absolute(uri) for stream, uri in self.given.items()}

    @property
    def backend(self) -> str:
        """Where to compute, as users say it."""
        return "auto" if self.num_gpus is None else "cuda" if self.num_gpus else "cpu"


def main() -> None:
    """Parse, extract, report."""
    presets = {name: preset.settings for name, preset in PRESETS.items()}
    run_command(with_preset(ExtractFeatures, presets), run, __doc__)


@dataclass(frozen=True)
class Source:
    """What features are made of, by which networks, and where they go."""

    config: ExtractFeatures
    output: str
    networks: FeatureNetworks
    task: FeatureTask
    catalog: Catalog | None
    stored: Stored | None

    @classmethod
    def open(cls, config: ExtractFeatures) -> Source:
        """Read the networks, and find the videos; prints what was found."""
        assert config.output, "checked by the flags"
        output = locate_output(config.output)
        networks = FeatureNetworks.load(config.uris, config.settings, which=config.which, precision=config.precision)
        stored = None if config.data is None else Stored.read(config.data, config.split)
        task = make_task(
            networks,
            config.uris,
            limits=config.limits,
            flow_preset=config.flow_preset,
            which=config.which,
            precision=config.precision,
            stored=stored,
        )
        catalog = find_videos(config) if stored is None else None
        if stored is not None:
            videos, classes = len(stored.index), len(stored.index.classes)
            print(f"data        {config.data}: {format_count(videos, 'video')}, {format_count(classes, 'class')}")
        for stream, network in networks.networks.items():
            if (trained := network.clips.fps or float(FRAMES_PER_SECOND)) != config.settings.fps:
                rates = f"trained on {describe_rate(trained)}, and sees {describe_rate(config.settings.fps)}"
                print(f"note        the network of --{stream} was {rates}", flush=True)
        return cls(config, output, networks, task, catalog, stored)

    @property
    def num_shards(self) -> int:
        """Shards of the whole run."""
        table = self.catalog.table if self.catalog is not None else self.stored.index.table  # type: ignore[union-attr]
        return -(-len(table) // self.config.videos_per_shard)

    def make_plan(self, kernel: str) -> FeaturePlan:
        """The plan of this command, computed by `kernel`."""
        given: dict[str, Any] = {"output": self.output, "kernel": kernel, "size": self.config.videos_per_shard}
        if self.stored is not None:
            return plan_stored(self.stored, self.task, self.networks, **given)
        assert self.catalog is not None
        assert self.config.videos is not None
        return plan_videos(self.catalog, self.task, self.networks, videos=self.config.videos, **given)

    def describe(self, kernel: str) -> dict[str, object]:
        """How the features are made, for features.json."""
        return describe_features(
            self.networks,
            preset=self.config.preset,
            precision=self.config.precision,
            weights=self.config.given,
            decoding=describe_decoding(self.task),
            flow=describe_flow(self.task, kernel),
        )


def run(config: ExtractFeatures) -> int:
    """Find the videos, make the shards of features that are not there yet, write the tables; the exit status."""
    source = Source.open(config)
    if config.dry_run:  # writes nothing: it may look while another run holds the lock
        return dry_run(source)
    assert config.output is not None
    with lock_output(source.output) as lock, lock.stop_run_when_lost():
        work = look_up(config, source.output, source.make_plan)
        if work and not work.blocks:
            report_nothing_to_do(work, config.output)
            return finish(source, work.plan, lock)
        num_shards = len(work.blocks) if work else source.num_shards
        with start_features(source, num_tasks=num_shards) as workers:
            # After the workers have started: the kernel's name is known only where it runs.
            if work is None or work.plan.kernel != workers.kernel:
                work = find_rest(config, source.make_plan(workers.kernel))
            log = extract(source, work, workers, lock)
        return finish(source, work.plan, lock, log)


@contextmanager
def start_features(source: Source, *, num_tasks: int) -> Iterator[Workers]:
    """Start Ray and what computes features."""
    task, config = source.task, source.config

    def start_pool(backend: str, placement: Placement) -> AbstractContextManager[FeaturePool | None]:
        from pipelines.features.pool import start_pool

        check_precision(config.precision, placement.flow_actors)
        return start_pool(task, backend, placement)

    def warm(backend: str | None) -> None:
        from pipelines.features.graph import warm_worker

        warm_worker(task, backend)

    load: Callable[[str], str] = load_flow_kernel if task.computes_flow else load_no_kernel
    what = f"features    of {' and '.join(task.streams)}, {config.precision},"
    with start_workers(
        config, source.output, start_pool, num_tasks=num_tasks, warm=warm, load=load, compiles=task.computes_flow,
        what=what,
    ) as workers:  # fmt: skip
        yield workers


def extract(source: Source, work: Work[FeaturePlan], workers: Workers, lock: OutputLock) -> RunLog:
    """Run the graph with progress lines; what was seen of it."""
    from pipelines.features import graph

    plan = work.plan
    print(f"output      {describe_output(plan)}", flush=True)
    log = RunLog(shards=len(plan.spans))
    remaining = graph.extract(
        plan, source.networks.windows, work.blocks, backend=workers.backend, placement=workers.placement,
        pool=workers.pool, claim=lock.claim, on_tally=log.add, tally_every_s=log.every_s,
    )  # fmt: skip
    follow(remaining, log, plan, workers.placement, lock)
    return log


def finish(source: Source, plan: FeaturePlan, lock: OutputLock, log: RunLog | None = None) -> int:
    """Assemble the output and draw its page, print the final table; the exit status. log: of what was made now."""
    from pipelines.features import manifest
    from pipelines.pages.features import write_features_report

    given = source.config.output
    assert given is not None
    lock.check()  # before what this run leaves of its own is settled: it may be another's by now
    page = storage.join(plan.output, "report.html")
    drawn = log is None and storage.exists(page) and storage.exists(storage.join(plan.output, SIDECAR))
    found = manifest.assemble(plan, source.describe(plan.kernel))
    if not drawn:
        write_features_report(plan.output, found)
    lock.check()
    # After the page: features.json says that all is there.
    manifest.finish(plan, found)
    print(format_summary(found))
    if found.quarantine_reasons:
        quarantine = storage.join(plan.output, "quarantine.parquet")
        print(format_failures(shards.read_table(quarantine), as_given(quarantine, given)))
    print(f"look at     {as_given(page, given)}")
    # Without one usable video there is nothing to go on with.
    return 0 if found.shards else 1


def format_summary(found: FeatureSet) -> str:
    """The final table."""
    columns = ("expected", "ok", "missing", "quarantined", "frames", "windows")
    splits = [(name, *(getattr(counts, column) for column in columns)) for name, counts in found.splits.items()]
    parts = [format_table(("split", *columns), splits)]
    if found.quarantine_reasons:
        parts.append(format_table(("quarantined because", "videos"), sorted(found.quarantine_reasons.items())))
    parts.append(f"features    {format_bytes(found.bytes)}, layout {found.settings['layout']}")
    return "\n" + "\n\n".join(parts) + "\n"


def dry_run(source: Source) -> int:
    """Print what the run would take, from a few videos whose features are computed in this process.

    Ray is needed only where a cluster divides the work, or its GPUs compute.
    """
    config, task = source.config, source.task
    estimate = partial(print_estimate, config, compiles=task.computes_flow)
    if not is_submitted():
        backend, placement = place(config, source.output, count_own_gpus)
        if not placement.flow_actors:
            check_precision(config.precision, 0)
            kernel = find_kernel(backend, computes_flow=task.computes_flow)
            plan, steps = steps_of(source, Workers(backend, placement, None, kernel))
            return estimate(plan, steps, cpus=config.num_cpus or os.cpu_count())
    with start_features(source, num_tasks=0) as workers:
        import ray

        plan, steps = steps_of(source, workers)
        return estimate(plan, steps, cpus=config.num_cpus or ray.cluster_resources().get("CPU"))


def steps_of(source: Source, workers: Workers) -> tuple[FeaturePlan, FeatureSteps]:
    """The plan of this command, and what a task does."""
    from pipelines.features.graph import FeatureSteps

    plan = source.make_plan(workers.kernel)
    return plan, FeatureSteps.of(plan, source.networks.windows, backend=workers.backend, pool=workers.pool)


if __name__ == "__main__":
    main()
